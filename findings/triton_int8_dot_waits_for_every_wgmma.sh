#!/usr/bin/env bash
# Triton 3.6.0 and 3.9.0, compiled for sm_90 (no GPU is needed): in the same matmul, tl.dot of int8 waits for every
# wgmma before it issues the next one; tl.dot of bfloat16 leaves one under way.
#
# Expected: int8 wgmma is asynchronous in hardware, as bfloat16's is, so one would think that the compiler overlaps
# both alike, and that an int8 matmul runs at twice the bfloat16 rate.
# Seen: in the loop's TTGIR the wait after the bfloat16 dot says pendings = 1, after the int8 dot pendings = 0, and the
# PTX has wgmma.wait_group 0 in place of 1. Tensor cores idle from each step's end to the next one's start.
# Why it matters: many-token int8 (W8A8 prefill) by tl.dot cannot reach the share of peak that bfloat16 does; kernels
# that should need wgmma of their own. A profile shows low tensor activity and nothing that explains it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(x, w, y, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUM: tl.constexpr):
    rows, columns, ks = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), SUM)
    for begin in range(0, k, BK):
        a = tl.load(x + rows[:, None] * k + begin + ks[None, :])
        b = tl.load(w + columns[None, :] * k + begin + ks[:, None])
        total = tl.dot(a, b, total, out_dtype=SUM)
    tl.store(y + rows[:, None] * BN + columns[None, :], total)


def waits(kind, total):
    """The waits inside the loop, as TTGIR and PTX have them."""
    pointers = {"x": f"*{kind}", "w": f"*{kind}", "y": f"*{total}", "k": "i32"}
    fixed = {"BM": 128, "BN": 128, "BK": 64 if kind == "bf16" else 128, "SUM": tl.float32 if total == "fp32" else tl.int32}
    names = product.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(
        product,
        {**pointers, **{name: "constexpr" for name in fixed}},
        {(names.index(name),): value for name, value in fixed.items()},
        aligned,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    ttgir, ptx = made.asm["ttgir"], made.asm["ptx"]
    assert "wgmma.mma_async" in ptx, "no wgmma"
    loop = ttgir[ttgir.index("scf.for"):]
    loop = loop[: loop.index("scf.yield")]
    return re.findall(r"warp_group_dot_wait.*pendings = (\d+)", loop), re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)


bf16, int8 = waits("bf16", "fp32"), waits("i8", "i32")
print(f"triton {triton.__version__}: bfloat16 waits {bf16}, int8 waits {int8}")
assert bf16[0] == ["1"] and "1" in bf16[1], "bfloat16 no longer leaves one wgmma under way"
assert int8[0] == ["0"] and set(int8[1]) == {"0"}, "int8 no longer waits for every wgmma"
PYTHON
for version in 3.6.0 3.9.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q --disable-pip-version-check "triton==$version" setuptools==80.9.0
  TRITON_CACHE_DIR="$work/cache-$version" "$work/$version/bin/python" "$work/look.py"
done
echo "as described"
