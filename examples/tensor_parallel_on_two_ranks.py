"""Runs a quantized Llama on two ranks, each with half of every layer, and compares its tokens with those of one process.

Here two processes on one machine; on several, start the body of `run` by torchrun.

needs: transformers safetensors
"""

import os
import tempfile

import torch
import transformers
from torch.distributed import FileStore, destroy_process_group, init_process_group
from transformers.distributed import DistributedConfig

import nybble

RANKS = 2


def run(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))  # what torchrun sets
    init_process_group("gloo", store=FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/dense",
        quantization_config=nybble.HfConfig("w4a16g32"),
        distributed_config=DistributedConfig(tp_plan="auto"),
    )
    tokens = torch.arange(8)[None]
    found = model.generate(tokens, max_new_tokens=4, do_sample=False)[0, 8:].tolist()
    layer = model.model.layers[0].mlp.down_proj
    print(
        f"rank {rank}: {layer.in_features} of 128 inputs of down_proj, {layer.nbytes} bytes; generated {found}",
        flush=True,
    )
    destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/dense")
    torch.multiprocessing.spawn(run, (folder,), RANKS)
