#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in less than nine minutes: build, self-check, the GPU tests,
# compute-sanitizer where it runs, ceilings, goals and peers, and tuning in what time is left.
#   bench/gpu_run.sh [--only STEP,...] [--out DIR]      steps: build test sanitize measure
# DIR (default: gpu-results) keeps the logs and results.jsonl; a second run goes on where the first one ended.
set -euo pipefail
cd "$(dirname "$0")/.."
only=build,test,sanitize,measure out=gpu-results
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) sed -n '2,5p' "$0" >&2; exit 2 ;;
  esac
done
for name in ${only//,/ }; do
  case $name in build | test | sanitize | measure) ;; *) echo "--only $name: must be of build, test, sanitize, measure" >&2; exit 2 ;; esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
tests=(tests/test_gpu*.py tests/test_triton_*.py tests/test_native_cuda.py tests/test_selfcheck.py)
failed=0
wanted() { [[ ,$only, == *,$1,* ]]; }
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

if wanted build; then
  step build
  timeout 150 "$python" -m pip install -q '.[test]' > "$out/build.log" 2>&1 || { tail -20 "$out/build.log"; exit 1; }
fi
if wanted test; then
  step "self-check and GPU tests"
  "$python" -m nybble kernels | tee "$out/kernels.txt"
  # In shares that run side by side: what takes long is Triton's compiler.
  "$python" -m pytest -q -p no:cacheprovider --collect-only "${tests[@]}" --deselect tests/test_triton_aot.py \
    > "$out/collected.txt" 2>&1 || { tail -5 "$out/collected.txt"; failed=1; }
  mapfile -t ids < <(grep '^tests/.*::' "$out/collected.txt")
  shares=$(nproc); shares=$((shares > 8 ? 8 : shares)) running=()
  for ((share = 0; share < shares; share++)); do
    mine=()
    for ((i = share; i < ${#ids[@]}; i += shares)); do mine+=("${ids[i]}"); done
    [ ${#mine[@]} -eq 0 ] && continue
    timeout 170 "$python" -m pytest -q -p no:cacheprovider "${mine[@]}" > "$out/tests-$share.log" 2>&1 &
    running+=($!)
  done
  for share in "${!running[@]}"; do
    wait "${running[share]}" || { failed=1; grep -E '^(FAILED|ERROR)' "$out/tests-$share.log" || echo "share $share: cut off"; }
    tail -1 "$out/tests-$share.log"
  done
fi
if wanted sanitize; then
  step compute-sanitizer
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      # Some hosts block it: then the log says so, and the run goes on.
      timeout 25 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
        tests/test_gpu.py -k "(integer_data or strides) and sm80" > "$out/sanitize-$tool.log" 2>&1 \
        && echo "$tool: clean" || echo "$tool: exit $?, see $out/sanitize-$tool.log"
    done
  else
    echo "not installed"
  fi
fi
if wanted measure; then
  step measure
  # What is left of nine minutes, less a reserve for the last result.
  left=$(((500 - SECONDS) / 60))
  "$python" -m nybble.bench.gpu_run --out "$out/results.jsonl" --minutes "$((left > 1 ? left : 1))" | tee "$out/table.txt"
fi
step done
exit $failed
