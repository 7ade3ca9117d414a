"""Quantize a language model while transformers loads it, and save it so that transformers loads it again.

    python examples/quantize_llama_while_loading.py MODEL OUT [SCHEME]

MODEL is a directory or a name that from_pretrained takes; SCHEME is w4a8g128 unless another is named. The model is never
there as floats as a whole: each weight is rounded when it is read.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import nybble


def main(source: str, out: str, scheme: str = "w4a8g128") -> None:
    """Load, show what the layers are, and save."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=nybble.HfConfig(scheme))
    layers = [one for one in model.modules() if isinstance(one, nybble.nn.QuantizedModule)]
    weights = sum(one.out_features * one.in_features for one in layers)
    print(
        f"{len(layers)} layers, {weights / 1e6:.1f} million weights in {sum(one.nbytes for one in layers) / 1e6:.1f} MB"
    )
    for name, why in model.hf_quantizer.left.items():
        print(f"{name} stays dense: {why}")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
