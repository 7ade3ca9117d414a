"""Trains a LoRA adapter on a model of 4-bit weights, saves it, loads it again, and merges it into the codes.

needs: peft transformers
"""

import tempfile

import peft
import torch
import transformers

import nybble

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
model = transformers.LlamaForCausalLM(config)  # in use: from_pretrained("a directory or a name")
nybble.quantize(model, "w4a16g32", exclude="lm_head", goal="memory")

nybble.patch_peft()  # once in a process
adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
adapted.print_trainable_parameters()

tokens = torch.randint(64, (8, 24))
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
losses = []
for _ in range(30):
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.8 * losses[0]

adapted.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    trained = adapted(input_ids=tokens).logits
    adapted.save_pretrained(folder)  # the adapter alone
    base = adapted.unload()
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(again(input_ids=tokens).logits, trained)

    merged = again.merge_and_unload()
    print(nybble.merge_report(merged))
    loss = merged(input_ids=tokens, labels=tokens).loss
    print(f"loss {loss:.3f} with the adapter in the codes")
    assert loss < 0.9 * losses[0]
