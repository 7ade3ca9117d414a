#!/usr/bin/env bash
# Builds the compare programs of this folder with g++'s address and undefined-behaviour sanitizers, and runs them, for the
# targets of this CPU. AVX-512 sources that this CPU cannot run are emulated in plain C++ (NYBBLE_EMULATE), and AMX
# always; `sanitize.sh all` also emulates the others, takes half an hour and more, and lets g++ optimize. Without `all`,
# kernels are compiled as they are written (-O0), for at most 4 rows at a time, those that differ by their vectors or a
# define from one that is built are left out, and each has an eighth of the cases. `sanitize.sh quick` takes a minute
# and a half on two cores: dense and sparse layers of 8 bits, and w4a16. Uses a temporary folder. The thread sanitizer is
# not used: it does not know libgomp's barriers and reports false races.
set -euo pipefail
case "${1:-}" in '' | quick | all) ;; *) echo "$1: must be quick, all or nothing" && exit 2 ;; esac
cd "$(dirname "$0")"
source flags.sh
shopt -s nullglob
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$work/cuda_built.def"  # no CUDA kernels here
csrc=$work/csrc
# Paths from here are the same in every clone, so that ccache, where there is one, compiles nothing twice.
launcher=$(command -v ccache || true)
export CCACHE_BASEDIR=$work CCACHE_NOHASHDIR=1
optimize=-O1 cases=200 programs=(kernels rows attention sparse lookup conv recurrent experts)
mkdir "$work/tests"
cp -r ../../csrc "$csrc"
cp -r . "$work/tests/native"
cd "$work/tests/native"
if [ "${1:-}" != all ]; then
  optimize=-O0 cases=25
  # The tiles of avx512bw are those of avx2 with other vectors, and the tiles of avxvnni those of avx512vnni.
  alike='(w[348]k?a(8|16)|w4nfa16|bsw8a8|spw8a8)_(avxvnni|avx512bw)(_groups|_gather)?'
  alike+='|(w3a8|w3a16|w4ka8|w4ka16)_(avx2|amx)|w8a(8|16)_avx2_groups'
  if [ "${1:-}" = quick ]; then
    alike+='|(w3a|w4ka|w4nfa|w4a8|spw4a8|w8a7|attention|conv|rows).*'
    cases=4 programs=(kernels sparse)
  fi
  sed -i -E "/^NYBBLE_[A-Z]+8?\\(($alike)[,)]/d" "$csrc/kernels.def"
  # The block_rows of a kernel are the register tiles that it has. Those of AMX are no template.
  sed -i -E '/_amx/! s/^(NYBBLE_LINEAR\(.*, )(5|6|8|12|16)(, (16|32), )/\14\3/' "$csrc/kernels.def"
  for file in "$csrc"/cpu/*.cpp; do
    if [[ $(basename "$file" .cpp) =~ ^($alike)$ ]]; then rm "$file"; fi
  done
fi

flags[amx]+=" -DNYBBLE_EMULATE_AMX" # always emulated: the programs do not ask for the registers
emulated="${flags[avx2]} ${optimize/1/g} -DNYBBLE_EMULATE -DNYBBLE_EMULATE_AMX -Wno-psabi -Wno-ignored-attributes"  # with -O1, g++ takes ten times as long here
common="-I$work -std=c++17 $optimize -g1 -Wall -Wextra -ffp-contract=off -fopenmp -DNYBBLE_BUILT_X86 -DNYBBLE_CASES=$cases \
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"

# compile FLAGS FILE...: compiles two files at a time. Objects shared by the programs are *.lib.o.
compile() {
  local flags=$1 suffix=${suffix:-.lib.o}
  shift
  if [ "$#" -eq 0 ]; then return; fi
  printf '%s\n' "$@" | xargs -P 2 -I{} sh -c "$launcher g++ $common $flags -c {} -o $work/\$(basename {} .cpp)$suffix"
}

# run PROGRAM ARGUMENT...: links a program and runs it. Waiting threads must not spin, because cores may be shared.
run() {
  local main=$1
  printf '== %s (%ss)\n' "$*" "$SECONDS"
  shift
  g++ $common "$work/$main.o" "$work"/*.lib.o -o "$work/$main"
  OMP_WAIT_POLICY=passive UBSAN_OPTIONS=print_stacktrace=1 "$work/$main" "$@"
}

# compare TARGET...: the kernels of these targets.
compare() {
  local program
  for program in "${programs[@]}"; do run compare_"$program" "$@"; done
}

has() {
  local flag
  for flag in "$@"; do
    grep -m1 '^flags' /proc/cpuinfo | grep -qw "$flag" || return 1
  done
}

suffix=.o compile -DNYBBLE_EMULATE_AMX compare_rounding.cpp $(printf 'compare_%s.cpp ' "${programs[@]}")
mapfile -t drivers < <(drivers "$csrc")
compile "${flags[scalar]}" "${drivers[@]}" "$csrc"/cpu/*_scalar*.cpp
compile "${flags[avx2]}" "$csrc"/cpu/*_avx2*.cpp
compile "${flags[avxvnni]}" "$csrc"/cpu/*_avxvnni*.cpp
here=(scalar)
real=()
if has avx2 fma f16c popcnt; then
  here+=(avx2)
  if has avx_vnni; then here+=(avxvnni); fi
  if has avx512f avx512bw avx512dq avx512vl; then real+=(avx512bw); fi
  if has avx512f avx512bw avx512dq avx512vl avx512_vnni; then
    real+=(avx512vnni)
    if has avx512vbmi avx512_vbmi2; then real+=(avx512vbmi); fi
    if has avx512_bf16; then real+=(avx512bf16 amx); fi
  fi
fi
emulate=()
for target in avx512bf16 amx avx512bw avx512vnni avx512vbmi; do # the slowest to compile first
  if [[ " ${real[*]} " == *" $target "* ]]; then
    compile "${flags[$target]}" "$csrc"/cpu/*_"$target"*.cpp
  else
    emulate+=("$csrc"/cpu/*_"$target"*.cpp)
  fi
done
if [ "${#emulate[@]}" -gt 0 ]; then compile "$emulated" "${emulate[@]}"; fi
if [ "${#here[@]}" -gt 1 ]; then here+=(avx512bw avx512vnni avx512vbmi avx512bf16 amx); fi
run compare_rounding
compare "${here[@]}"

if [ "${1:-}" = all ] && [ "${#real[@]}" -gt 0 ]; then
  compile "$emulated" "$csrc"/cpu/*_avx512{bf16,bw,vnni,vbmi}*.cpp "$csrc"/cpu/*_amx*.cpp
  compare "${real[@]}"
fi
