#!/usr/bin/env bash
# Checks correctness on this GPU: installs the wheels from gpu_prepare.sh, runs the smoke test (gpu_smoke), and every CUDA
# kernel once under compute-sanitizer, in at most 280 seconds. Needs no network. Run bench/gpu_goals.sh afterwards.
#   bench/gpu_run.sh [--out DIR] [--wheels DIR] [--dry-run]
# Writes gpu_run.tar.gz to --out (default: gpu-results). --wheels defaults to .whl. --dry-run: on the CPU.
NAME=gpu_run TOTAL=280
cd "$(dirname "$0")/.." || exit
. bench/gpu_common.sh

jobs=$(nproc); jobs=$((jobs > 10 ? 10 : jobs))
limited 150 smoke "$python" -m nybble.bench.gpu_smoke --jobs "$jobs" --limit 140 --out "$results/smoke.jsonl" $dry

limited 25 sanitize-plan "$python" -m nybble.bench.gpu_sanitize_plan "$work/plan.json" $dry
for tool in memcheck racecheck; do
  sanitizer=$(command -v compute-sanitizer || echo "$site/nvidia/cu13/bin/compute-sanitizer")
  under=("$sanitizer" --tool "$tool" --error-exitcode 9)
  [ -n "$dry" ] && under=(env)
  limited 30 "$tool" "${under[@]}" "$python" -m bench.gpu_sanitize "$work/plan.json" --site "$site" $dry
done
