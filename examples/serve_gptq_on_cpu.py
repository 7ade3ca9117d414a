"""Serves a GPTQ checkpoint on a CPU, on nybble's kernels: the codes in the file are used as they are.

needs: transformers safetensors

    python serve_gptq_on_cpu.py DIR 8000
    curl --data '{"tokens": [1, 2, 3], "new": 8}' http://127.0.0.1:8000

Without a directory it makes a small checkpoint, and asks itself once. An example: one request at a time, for this machine only.
"""

import json
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
import transformers

import nybble


def small_checkpoint() -> str:
    """A random Llama of 4 bits as GPTQ's libraries write it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    nybble.quantize(model, "w4a16g32", include="*proj", goal="memory")
    folder = f"{tempfile.mkdtemp()}/gptq"
    nybble.save_pretrained(model, folder, format="gptq", round_scales=True)
    return folder


def server(directory: str, port: int) -> HTTPServer:
    """Answers tokens with those that follow. AWQ, compressed-tensors and bitsandbytes load alike."""
    asked = nybble.HfConfig(act_bits=8)  # inputs of layers are rounded too: faster; 16 keeps them
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=asked)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = torch.tensor([told["tokens"]])
            found = model.generate(tokens, max_new_tokens=int(told["new"]), do_sample=False)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(found[0, tokens.shape[1] :].tolist()).encode())

    return HTTPServer(("127.0.0.1", port), Handler)


if len(sys.argv) > 2:
    server(sys.argv[1], int(sys.argv[2])).serve_forever()
else:
    serving = server(small_checkpoint(), 0)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{serving.server_port}"
    with urllib.request.urlopen(address, b'{"tokens": [1, 2, 3], "new": 4}') as answer:
        print("answer:", json.load(answer))
    serving.shutdown()
