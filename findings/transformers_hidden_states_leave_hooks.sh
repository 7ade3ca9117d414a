#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: one call with output_hidden_states=True leaves forward hooks on every decoder layer
# and every attention module of the model, for good.
#
# Expected: hidden states are collected for the call that asks for them; afterwards the model is what it was.
# Seen: before the call no module has a forward hook; after it, each decoder layer and each attention has one, also after
# further calls that ask for nothing. deepcopy copies them.
# Why it matters: tools that leave modules with hooks alone, since a replacement would lose them, or that check for hooks
# to see whether somebody watches (quantizers, fusers, exporters, offloading), treat the model differently from the first
# such call on, for instance after an evaluation that compared hidden states. They must tell hooks that collect now from
# hooks that once did.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$work/run.py" <<'PY'
import copy

import torch
from transformers import LlamaConfig, LlamaModel

sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50)
model = LlamaModel(LlamaConfig(**sizes)).eval()
ids = torch.arange(5)[None]


def hooked(of):
    return sum(bool(module._forward_hooks) for name, module in of.named_modules() if name.startswith("layers."))


with torch.no_grad():
    model(ids)
    before = hooked(model)
    model(ids, output_hidden_states=True)
    after = hooked(model)
    model(ids)
    print(before, after, hooked(model), hooked(copy.deepcopy(model)))
PY
got=$("$work/venv/bin/python" -W ignore "$work/run.py" 2>/dev/null | tail -1)
echo "modules in the layers with forward hooks: before, after the call, after another call, in a copy: $got"
[ "$got" = "0 6 6 6" ] && echo "as described" || { echo "changed"; exit 1; }
