"""LoRA by PEFT on quantized layers: training, and adapters merged into codes."""
