"""What passes need to know about a model.

Inside: `walk` (modules, their names and shared memory, reversible edits), `eligible` (which layers can be replaced),
`options` (checks of the arguments that passes share), `batches` (calibration batches), `chain` and `stages` (running a
model block by block), `inputs` and `observe` (statistics of layer inputs), `digest` (a hash of the data), `bar`.
"""
