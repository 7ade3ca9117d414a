"""Microbenchmarks: ``python -m nybble.bench``."""
