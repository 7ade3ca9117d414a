#!/usr/bin/env bash
# Cross-compiles the compare programs of this folder for AArch64 Linux, and runs them by qemu's user emulation for the
# targets of Arm, each on an old CPU that has it, where qemu knows one. Kernels are optimized as they are shipped. Buffers
# end where memory does (guarded_new.cpp). Needs aarch64-linux-gnu-g++ and qemu-aarch64 or qemu-aarch64-static; uses a
# temporary folder.
#   arm.sh TARGET...         some of the targets; default: all
#   arm.sh quick TARGET...   every kernel on a few cases, with at most 3 rows at a time and less optimized: about two
#                            CPU minutes
set -euo pipefail
cd "$(dirname "$0")"
source flags.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
csrc="$work/csrc"
cp -r ../../csrc "$csrc"
: > "$work/cuda_built.def"  # no CUDA kernels here
# Paths from here are the same in every clone, so that ccache, where there is one, compiles nothing twice.
launcher=$(command -v ccache || true)
export CCACHE_BASEDIR=$work CCACHE_NOHASHDIR=1
mkdir "$work/tests"
cp -r . "$work/tests/native"
cd "$work/tests/native"
if ! qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64); then echo "needs qemu-aarch64"; exit 2; fi
if ! command -v aarch64-linux-gnu-g++ > /dev/null; then echo "needs aarch64-linux-gnu-g++"; exit 2; fi

scalar=-O1 optimize=-O2 cases=50 programs="kernels rows sparse lookup conv recurrent experts attention"
targets=(scalar neon neondot i8mm neonbf16)
if [ "${1:-}" = quick ]; then
  shift
  scalar=-O0 optimize=-O1 cases=4 programs="kernels rows sparse conv attention" targets=(neon neondot i8mm neonbf16)
  # The sixth column.
  sed -i -E 's/^(NYBBLE_LINEAR\((\w+, ){2}scalar, (\w+, ){2})[0-9]+/\12/; t; s/^(NYBBLE_LINEAR\((\w+, ){5})[0-9]+/\13/' \
    "$csrc/kernels.def"
fi
if [ "$#" -gt 0 ]; then targets=("$@"); fi

declare -A cpu=([scalar]=cortex-a53 [neon]=cortex-a53 [neondot]=neoverse-n1 [i8mm]=max [neonbf16]=max)
for target in "${targets[@]}"; do
  if [ -z "${cpu[$target]:-}" ]; then echo "target $target: must be one of ${!cpu[*]}"; exit 2; fi
done
common="-I$work -std=c++17 -Wall -Wextra -ffp-contract=off -fopenmp -DNYBBLE_BUILT_ARM -DNYBBLE_CASES=$cases"

# Lines of flags and file, the slowest files first, compiled two at a time.
{
  for file in "$csrc"/cpu/*_scalar*.cpp; do echo "$scalar $file"; done
  for target in neon neondot i8mm neonbf16; do # the table names all
    for file in "$csrc"/cpu/*_"$target".cpp "$csrc"/cpu/*_"$target"_*.cpp; do
      if [ -e "$file" ]; then echo "$optimize ${flags[$target]} $file"; fi
    done
  done
  for program in $programs; do echo "-O1 -I$(pwd) $(pwd)/compare_$program.cpp"; done
  echo "-O1 $(pwd)/guarded_new.cpp"
  drivers "$csrc" | sed 's/^/-O1 /'
} > "$work/files"
xargs -P 2 -I{} sh -c "set -- {}; for file; do :; done
  $launcher aarch64-linux-gnu-g++ $common -c {} -o $work/\$(basename \"\$file\" .cpp).o" < "$work/files"
printf '== compiled (%ss)\n' "$SECONDS"

mkdir "$work/lib"
mv "$work"/compare_*.o "$work/lib"
for program in $programs; do
  # Statically, so that no AArch64 library needs to be found. libgomp's plug-ins are not used.
  aarch64-linux-gnu-g++ -static -fopenmp "$work/lib/compare_$program.o" "$work"/*.o -o "$work/$program" 2> "$work/link.log" ||
    { cat "$work/link.log"; exit 1; }
  for target in "${targets[@]}"; do
    printf '== %s %s (%ss)\n' "$program" "$target" "$SECONDS"
    OMP_WAIT_POLICY=passive "$qemu" -cpu "${cpu[$target]}" "$work/$program" "$target" | tee -a "$work/$program.log"
  done
  if ! grep -q ' cases, ' "$work/$program.log"; then echo "$program: compared no kernel"; exit 1; fi
done

# Each kernel is compared by some program, but those that make panels for others.
for target in "${targets[@]}"; do
  awk -F '[(, )]+' -v target="$target" '
    /^NYBBLE_LINEAR/ && $4 == target || /^NYBBLE_(ATTENTION8?|ROWS|CONV)\(/ && $3 == target { print $2 }' "$csrc/kernels.def"
done > "$work/kernels"
cut -d ' ' -f 1 "$work"/*.log | sort > "$work/compared"
if missing=$(grep -vxFf "$work/compared" "$work/kernels"); then echo "not compared:" $missing; exit 1; fi
