"""Benchmarks of nybble's kernels against other libraries, with correctness checks: ``python -m nybble.bench``.

- shapes, weights, peers, contestants: what is timed. run, timing: the measurement, one cell (shape, M, dtype, ...) at a time.
- results, output, progress: result files (JSON lines), and how far a run is. compare, report*, crossover*: reading them.
- goals, goal_tables, figures, attention, encoder, quantizing, presets, held: performance targets. ceilings*: peak rates, for the roofline.
- loading, loading_files: time and memory of loading checkpoints, by several libraries.
- model, llama, outside: whole models. accuracy*: accuracy of the passes. gpu_*: everything for GPUs.
"""
