"""nybble as a quantization method of transformers: ``from_pretrained`` and ``save_pretrained``."""
