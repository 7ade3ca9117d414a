"""Quantizes a Llama while transformers loads it, saves it, and loads it again. The whole model is never there as floats.

needs: transformers safetensors
"""

import tempfile

import torch
import transformers

import nybble

torch.manual_seed(0)
folder = tempfile.mkdtemp()
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/dense")  # in use: a directory or a name that you have

asked = nybble.HfConfig("w4a8g32", per_layer={"lm_head": "w8a8"})
model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/dense", quantization_config=asked)
layers = [layer for layer in model.modules() if isinstance(layer, nybble.nn.QuantizedModule)]
weights = sum(layer.out_features * layer.in_features for layer in layers)
print(f"{len(layers)} layers: {8 * sum(layer.nbytes for layer in layers) / weights:.1f} bits a weight")
for name, why in model.hf_quantizer.left.items():
    print(f"{name} stays dense: {why}")

model.save_pretrained(f"{folder}/quantized")
again = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/quantized")
tokens = torch.randint(64, (1, 8))
with torch.no_grad():
    assert torch.equal(again(tokens).logits, model(tokens).logits)
print("generated:", again.generate(tokens, max_new_tokens=4, do_sample=False)[0, 8:].tolist())
