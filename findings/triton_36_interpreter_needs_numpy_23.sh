#!/usr/bin/env bash
# triton 3.6.0 (the one that torch 2.10.0 pins) and 3.7.1, interpreted (TRITON_INTERPRET=1), with NumPy 2.3.5 and 2.4.6;
# torch 2.13.0 lends the tensors.
#
# Expected: a kernel that compiles for a GPU also runs in the interpreter, whichever NumPy is there: Triton does not
# require NumPy, and torch sets it no upper bound.
# Seen: with NumPy 2.4 the interpreter of 3.6.0 raises "only 0-dimensional arrays can be converted to Python scalars" in
# each kernel with a loop whose bounds are known only at run time, such as `range(0, tl.cdiv(n, BLOCK))`: it keeps such
# numbers as arrays of one element, which NumPy no longer takes for an int. The same kernel is right with NumPy 2.3, and
# by 3.7.1 with both.
# Why it matters: the interpreter is how kernels are tested without a GPU. The error names the kernel's own line and says
# nothing of NumPy, so it looks like a fault of the kernel; and a fresh environment of torch 2.10 has these two versions.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0
cat > "$work/kernel.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, y, n, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, tl.cdiv(n, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        sums += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y, tl.sum(sums, 0))


y = torch.zeros(1)
try:
    total[(1,)](torch.arange(100, dtype=torch.float32), y, 100, BLOCK=32)
    print(f"sum {y.item():.0f}")
except Exception as error:
    print(error)
PY
ok=0
check() { # triton numpy expected
  pip --no-deps "triton==$1" "numpy==$2"
  got=$(TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/kernel.py" 2> /dev/null | tail -n 1)
  echo "triton $1, numpy $2: $got"
  [[ $got == *"$3"* ]] || ok=1
}
check 3.6.0 2.3.5 "sum 4950"
check 3.6.0 2.4.6 "only 0-dimensional arrays can be converted to Python scalars"
check 3.7.1 2.3.5 "sum 4950"
check 3.7.1 2.4.6 "sum 4950"
[ "$ok" = 0 ] && echo "as described" || { echo "changed"; exit 1; }
