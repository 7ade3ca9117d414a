#!/usr/bin/env bash
# How fast is it on this GPU? Installs what gpu_prepare.sh made, then measures the machine, its ceilings, the goals of
# gpu_goals and the peers, in at most 240 seconds. Needs no network. Before: bench/gpu_run.sh.
#   bench/gpu_goals.sh [--out DIR] [--wheels DIR] [--dry-run]
# DIR (default: gpu-results) gets gpu_goals.tar.gz with results.jsonl; wheels come from .whl. --dry-run: on the CPU.
NAME=gpu_goals TOTAL=240
cd "$(dirname "$0")/.." || exit
. bench/gpu_common.sh

measure=("$python" -m nybble.bench.gpu_run --out "$results/results.jsonl"
  --only machine,ceilings,goals,peers,end $dry)
limited 180 measure "${measure[@]}" --seconds 145
if [ $? -eq 3 ]; then  # a kernel's fault ended CUDA in that process: the rest, in the time that is left before the table
  left=$((TOTAL - SECONDS - 20))
  limited "$left" measure-again "${measure[@]}" --seconds $((left - 35))
fi
# Once more from the file, which is whole where measuring was cut off.
limited 15 table "$python" -m nybble.bench.gpu_run --out "$results/results.jsonl" --report $dry
