"""torch.nn.Linear with a sparse integer weight."""

from __future__ import annotations

from .linear import Linear
from .weight import portable_tensor


class SparseLinear(Linear):
    """y = x w^T + bias with w as integers whose zeros are not stored: a drop-in for torch.nn.Linear.

    Has all methods of Linear. The scheme names the pattern of zeros: "sp50w8a8" (half of the weights, anywhere),
    "sp24w4a16g128" (2:4), "sp32of128w8a8", "bs32x32w8a8" (blocks). ``from_dense`` and ``from_weight`` do not prune:
    they take a weight that already has its zeros. A weight that rounds to 0 is not stored either.

    ``state_dict`` holds ``scale`` and ``values``, with ``mask``, or for blocks with ``block_start`` and
    ``block_index``; see ``layouts.portable``. The packed layout depends on the share of zeros.

    Loading a weight with another number of values allocates new memory. Other processes that share the layer keep the
    former weight, and no other thread may be in ``forward`` at that time.
    """

    is_sparse = True
    sparsity_rule = "SparseLinear needs a sparse scheme such as 'sp50w8a8'"
    mask = portable_tensor("mask")
    values = portable_tensor("values")
    block_start = portable_tensor("block_start")
    block_index = portable_tensor("block_index")
