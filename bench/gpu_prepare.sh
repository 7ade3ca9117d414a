#!/usr/bin/env bash
# Prepares benchmarks for a machine with an H100 or H200, Python 3.12 and no network: builds nybble's wheel for that GPU,
# and downloads wheels of other libraries and compute-sanitizer. Needs nvcc, Python 3.12 (or PYTHON) and a network; no GPU.
#   bench/gpu_prepare.sh [--out DIR] [--only STEP,...]      steps: wheel peers check
# DIR (default: .whl, which git ignores) stays below 64 MiB, to be copied easily. Existing wheels are not downloaded again.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.whl only=wheel,peers,check
while [ $# -gt 0 ]; do
  case $1 in
    --out | --only) [ $# -gt 1 ] || { echo "$1: must be followed by a value" >&2; exit 2; } ;;&
    --out) out=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    *) echo "$1: unknown option" >&2; sed -n '2,5p' "$0" >&2; exit 2 ;;
  esac
done
IFS=, read -ra names <<< "$only,"
for name in "${names[@]}"; do
  case $name in wheel | peers | check) ;; *) echo "--only $name: must be one of wheel, peers, check" >&2; exit 2 ;; esac
done
wanted() { [[ ,$only, == *,$1,* ]]; }
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
mkdir -p "$out"
venv=build/gpu-venv
python=$venv/bin/python

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' > /dev/null 2>&1; }
if ! is_312 "$python"; then
  step "environment of Python 3.12"
  base=
  for found in ${PYTHON:-python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python}; do
    if is_312 "$found"; then base=$found; break; fi
  done
  [ -n "$base" ] || { echo "PYTHON=${PYTHON:-}: must be a Python 3.12, and none was found" >&2; exit 1; }
  "$base" -m venv --clear "$venv"
  "$python" -m pip install -q --disable-pip-version-check build scikit-build-core pybind11 ninja cmake
fi
if wanted wheel; then
  step "wheel for sm_90a"
  rm -f "$out"/nybble-*.whl
  # Objects are kept in build/gpu, for incremental builds.
  PATH=$PWD/$venv/bin:$PATH "$python" -m build -q --wheel --no-isolation --outdir "$out" -Cbuild-dir=build/gpu \
    -Ccmake.define.NYBBLE_CUDA=ON -Ccmake.define.NYBBLE_CUDA_ARCHITECTURES=90a .
fi
if wanted peers; then
  step "peers"
  "$python" -m bench.gpu_wheels "$out"
fi
if wanted check; then
  step "check"
  "$python" -m bench.gpu_wheels_check "$out"
fi
