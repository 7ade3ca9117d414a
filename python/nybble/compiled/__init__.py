"""Compiled, parallel code for what quantizing and pruning spend their time on. Each function equals its definition in torch."""
