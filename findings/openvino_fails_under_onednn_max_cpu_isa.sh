#!/usr/bin/env bash
# openvino 2026.4.1 (CPU plugin, x86-64 with AVX-512): ONEDNN_MAX_CPU_ISA, which people set to make torch or oneDNN behave
# like an older CPU, reaches the oneDNN that OpenVINO brings along, but not the code around it.
#
# Expected: under ONEDNN_MAX_CPU_ISA=AVX2, OpenVINO runs its AVX2 kernels, as oneDNN's own programs and torch do; or it says
# at compilation that it cannot.
# Seen: compile_model succeeds, and the first inference of a plain float32 product raises "could not create a primitive
# descriptor". Under AVX512_CORE (AVX-512 without VNNI), float32 works and int8 weights raise the same.
# Why it matters: in a benchmark that holds several libraries to one instruction set, OpenVINO does not become slower but
# drops out, and with it the baseline; a service that sets the variable for torch loses OpenVINO at the first request, not
# at start-up.
set -euo pipefail
grep -q avx512_vnni /proc/cpuinfo || { echo "needs a CPU with AVX-512 VNNI"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
cat > "$work/run.py" <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as op

K = 256
codes = np.random.default_rng(0).integers(-127, 128, (K, K)).astype(np.int8)
x = op.parameter([-1, K], ov.Type.f32)
weight = op.constant(codes.astype(np.float32))
if sys.argv[1] == "int8":
    weight = op.multiply(op.convert(op.constant(codes), "f32"), op.constant(np.full((K, 1), 0.01, np.float32)))
model = ov.Model([op.matmul(x, weight, transpose_a=False, transpose_b=True)], [x])
compiled = ov.Core().compile_model(model, "CPU")
try:
    compiled([np.ones((4, K), np.float32)])
    print("runs")
except RuntimeError as error:
    print("raises" if "could not create a primitive descriptor" in str(error) else error)
PY
ok=0
check() { # ISA kind expected
  got=$(ONEDNN_MAX_CPU_ISA=$1 "$work/venv/bin/python" "$work/run.py" "$2")
  echo "ONEDNN_MAX_CPU_ISA=$1, $2 weights: $got"
  [ "$got" = "$3" ] || ok=1
}
check DEFAULT f32 runs
check DEFAULT int8 runs
check AVX2 f32 raises
check AVX2 int8 raises
check AVX512_CORE f32 runs
check AVX512_CORE int8 raises
[ "$ok" = 0 ] && echo "as described" || { echo "changed"; exit 1; }
