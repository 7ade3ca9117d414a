#!/usr/bin/env bash
# torch 2.10.0 and 2.11.0, wheels on PyPI for Linux on AArch64 (CPython 3.11), as pip 25.3 resolves them; also 2.13.0.
#
# Expected: on Arm, `pip install torch` brings the build for CPUs, as it did for years while only x86-64 brought CUDA.
# Seen: up to 2.10.0 each requirement on CUDA carries the condition platform_machine == "x86_64". From 2.11.0 on the
# condition is gone: on AArch64 the same command requires cuDNN, NCCL, cuSPARSELt, NVSHMEM, the CUDA toolkit's libraries
# and Triton.
# Why it matters: a requirement such as torch>=2.8 in the image of an Arm server, a board or a small container without a
# GPU grows by gigabytes between two minor versions, with no change of theirs; who means the CPU must now say so on
# Arm too (an index of CPU builds, or torch<2.11).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pip==25.3 packaging==25.0
cat > "$work/needs.py" <<'PY'
import json
import sys

from packaging.requirements import Requirement

arm = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "aarch64", "python_version": "3.11"}
(found,) = json.load(open(sys.argv[1]))["install"]
needed = [Requirement(text) for text in found["metadata"]["requires_dist"]]
names = sorted(one.name for one in needed if one.marker is None or one.marker.evaluate({**arm, "extra": ""}))
print("cuda" if any(name.startswith(("nvidia-", "cuda-")) for name in names) else "no cuda")
PY
ok=0
check() { # version expected
  # Reads the wheel's metadata alone.
  "$work/venv/bin/pip" install -q --disable-pip-version-check --dry-run --ignore-installed --no-deps --target "$work/none" \
    --platform manylinux_2_28_aarch64 --python-version 311 --only-binary=:all: --report "$work/report.json" "torch==$1"
  got=$("$work/venv/bin/python" "$work/needs.py" "$work/report.json")
  echo "torch $1 on AArch64 Linux needs: $got"
  [ "$got" = "$2" ] || ok=1
}
check 2.8.0 "no cuda"
check 2.10.0 "no cuda"
check 2.11.0 cuda
check 2.13.0 cuda
[ "$ok" = 0 ] && echo "as described" || { echo "changed"; exit 1; }
