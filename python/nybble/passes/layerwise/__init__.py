"""Go through a model block by block on calibration data, and put each new layer in its place before the next is made."""
