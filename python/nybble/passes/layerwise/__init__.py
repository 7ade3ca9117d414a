"""What methods that go through a model block by block on calibration data share.

Each replacement is put into the model before the next block runs, so that later blocks see its outputs.

Inside: `run` (one call of a pass, from arguments to report), `work` (the loop over blocks and layers), `outcome` (the
result of a method for one weight), `errors` (output errors), `static` (static activation scales), `store` (resuming), and
for GPTQ and SparseGPT `factor` (the Hessian) and `sweep` (the loop over input channels).
"""
