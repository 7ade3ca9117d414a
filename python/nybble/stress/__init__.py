"""Figures of reliability that a stranger can repeat: `python -m nybble.stress --list`.

Each figure is one command. It tries something many times, from a seed, and counts what failed. The tests run a small share
of each, and docs/reliability.md has the results of whole runs.

Inside: `table` (the figures), `figure` (what one is), `children` (processes that may be killed or have little memory),
`damage` (how bytes and JSON are changed), and a module for each kind of figure.
"""
