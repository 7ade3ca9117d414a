"""Rounding methods of `nybble.quantize`.

Inside: `methods` (the table of methods and their fallbacks), `gptq`, `clip` (AWQ's clipping), `scales` and `folds` (AWQ's
and SmoothQuant's input scales, and where a preceding layer can absorb them), `work` (the pass over all layers).
"""
