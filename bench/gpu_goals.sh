#!/usr/bin/env bash
# Measures speed on this GPU: installs the wheels from gpu_prepare.sh, then measures peak rates, the goals of gpu_goals
# and other libraries, in at most 240 seconds. Needs no network. Run bench/gpu_run.sh before.
#   bench/gpu_goals.sh [--out DIR] [--wheels DIR] [--dry-run]
# Writes gpu_goals.tar.gz with results.jsonl to --out (default: gpu-results). --wheels defaults to .whl. --dry-run: CPU.
NAME=gpu_goals TOTAL=240
cd "$(dirname "$0")/.." || exit
. bench/gpu_common.sh

measure=("$python" -m nybble.bench.gpu_run --out "$results/results.jsonl"
  --only machine,ceilings,goals,peers,end $dry)
limited 180 measure "${measure[@]}" --seconds 145
if [ $? -eq 3 ]; then  # a kernel fault made the GPU unusable for that process: measure the rest in a new one
  left=$((TOTAL - SECONDS - 20))
  limited "$left" measure-again "${measure[@]}" --seconds $((left - 35))
fi
# Print the table from the file, in case measuring was cut off.
limited 15 table "$python" -m nybble.bench.gpu_run --out "$results/results.jsonl" --report $dry
