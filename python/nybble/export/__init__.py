"""Models with quantized layers for other runtimes."""
