"""Serve a GPTQ checkpoint on a CPU, on nybble's kernels: the codes in the file are used as they are.

    python examples/serve_gptq_on_cpu.py MODEL [PORT]
    curl --data '{"prompt": "Once upon a time", "max_new_tokens": 20}' http://127.0.0.1:8000

MODEL is a directory or a name that from_pretrained takes. AWQ, compressed-tensors and bitsandbytes work alike. For an
example only: one request at a time, on this machine alone.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from transformers import pipeline

import nybble


def server(source: str, port: int) -> HTTPServer:
    """A server that answers a prompt with its continuation. Port 0 takes any that is free."""
    config = nybble.HfConfig(act_bits=8)  # inputs of layers are rounded too: faster, and a little less exact
    generate = pipeline("text-generation", model=source, model_kwargs={"quantization_config": config})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt, tokens = str(asked["prompt"]), int(asked.get("max_new_tokens", 20))
            except (KeyError, TypeError, ValueError) as error:
                self.send_error(400, f"needs JSON with a prompt: {type(error).__name__}")
                return
            text = generate(prompt, max_new_tokens=tokens, do_sample=False, return_full_text=False)[0]["generated_text"]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"text": text}).encode())

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    server(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
