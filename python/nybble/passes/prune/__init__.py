"""Pruning methods of `nybble.sparsify`.

Inside: `masks` (scores and masks), `choosers`, `sparsegpt` and `refit` (SparseGPT), `weight` (prune one weight, with
fallbacks), `recognize` (the pattern that a weight already has), `allocate` (the percentage of zeros of each layer),
`permute` (search for a permutation) and `permuter` (apply it), for n:m, `work` (the pass over all layers).
"""
