#!/usr/bin/env bash
# How fast is it on this GPU? Installs what gpu_prepare.sh made, then measures the machine, its ceilings, the goals of
# gpu_goals and the peers, in at most 240 seconds. Needs no network. Before: bench/gpu_run.sh.
#   bench/gpu_goals.sh [--out DIR] [--wheels DIR] [--dry-run]
# DIR (default: gpu-results) gets gpu_goals.tar.gz with results.jsonl; wheels come from .whl. --dry-run: on the CPU.
NAME=gpu_goals TOTAL=240
cd "$(dirname "$0")/.." || exit
. bench/gpu_common.sh

limited 195 measure "$python" -m nybble.bench.gpu_run --out "$results/results.jsonl" \
  --only machine,ceilings,goals,peers,end --seconds 160 $dry
# Once more from the file, which is whole where measuring was cut off.
limited 25 table "$python" -m nybble.bench.gpu_run --out "$results/results.jsonl" --report $dry
