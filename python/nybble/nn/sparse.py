"""nn.Linear with integer weights of which many are zero."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler

from .linear import Linear, send
from .weight import portable_tensor


class SparseLinear(Linear):
    """y = x w^T + bias with w as integers whose zeros are not stored: a drop-in for torch.nn.Linear.

    All that Linear does, with a scheme that names the zeros: "sp50w8a8" (half of the weights, anywhere), "sp24w4a16g128"
    (2:4), "sp32of128w8a8", "bs32x32w8a8" (blocks). `from_dense` and `from_weight` take a weight whose zeros are in place:
    what rounds to 0 is not stored either. `state_dict` holds `mask` and `values`, or of blocks `block_start`,
    `block_index` and `values`, and `scale`; see portable.py. How the weight lies in memory depends on the share of zeros.

    Loading a weight that keeps another number of values moves it: other processes that share the layer keep the old
    one, and no thread may be in `forward` meanwhile.
    """

    _sparse = True
    _wants = "SparseLinear needs a sparse scheme such as 'sp50w8a8'"
    mask = portable_tensor("mask")
    values = portable_tensor("values")
    block_start = portable_tensor("block_start")
    block_index = portable_tensor("block_index")


ForkingPickler.register(SparseLinear, send)
