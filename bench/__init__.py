"""Microbenchmarks, checked and side by side with other libraries: ``python -m nybble.bench``.

shapes, peers, entrants: what runs. run, timing: races, cell by cell. results, output: lines of results. goals, figures,
presets: which targets are met. compare, report*: what files of results say. ceilings*: what the machine can do at most.
model, llama, outside: whole models.
"""
