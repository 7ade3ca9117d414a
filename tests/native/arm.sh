#!/usr/bin/env bash
# Cross-compiles the compare programs of this folder for AArch64 Linux, and runs them by qemu's user emulation for the
# targets of Arm, each on an old CPU that has it, where qemu knows one. Kernels are optimized as they are shipped. Buffers
# end where memory does (guarded_new.cpp). Needs aarch64-linux-gnu-g++ and qemu-aarch64 or qemu-aarch64-static; uses a
# temporary folder. `arm.sh TARGET...` runs some of the targets. compare_attention is left out: no kernel for it yet.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$work/cuda_built.def"  # no CUDA kernels here
csrc=../../csrc
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)

# The flags of CMakeLists.txt, and the CPU.
declare -A flags=([neon]="" [neondot]="-march=armv8.2-a+dotprod" [i8mm]="-march=armv8.2-a+dotprod+i8mm")
declare -A cpu=([scalar]=cortex-a53 [neon]=cortex-a53 [neondot]=neoverse-n1 [i8mm]=max)
targets=("$@")
if [ "${#targets[@]}" -eq 0 ]; then targets=(scalar neon neondot i8mm); fi
common="-I$work -std=c++17 -Wall -Wextra -ffp-contract=off -fopenmp -DNYBBLE_BUILT_ARM -DNYBBLE_CASES=50"

# compile FLAGS FILE...: compiles two files at a time.
compile() {
  local flags=$1
  shift
  printf '%s\n' "$@" | xargs -P 2 -I{} sh -c "aarch64-linux-gnu-g++ $common $flags -c {} -o $work/\$(basename {} .cpp).o"
}

drivers=()
for file in "$csrc"/*.cpp; do
  case $(basename "$file") in
    bindings*.cpp | shape.cpp | plan.cpp | aot.cpp | no_python.cpp | cpu_features.cpp | probe.cpp) ;;
    *) drivers+=("$file") ;;
  esac
done
compile -O1 compare_*.cpp guarded_new.cpp "${drivers[@]}" "$csrc"/cpu/*_scalar*.cpp
for target in neon neondot i8mm; do # the table names all
  files=()
  for file in "$csrc"/cpu/*_"$target".cpp "$csrc"/cpu/*_"$target"_*.cpp; do
    if [ -e "$file" ]; then files+=("$file"); fi
  done
  compile "-O2 ${flags[$target]}" "${files[@]}"
done

mkdir "$work/lib"
mv "$work"/compare_*.o "$work/lib"
for program in kernels rows sparse lookup conv recurrent experts; do
  # Statically, so that no AArch64 library needs to be found. libgomp's plug-ins are not used.
  aarch64-linux-gnu-g++ -static -fopenmp "$work/lib/compare_$program.o" "$work"/*.o -o "$work/$program" 2> "$work/link.log" ||
    { cat "$work/link.log"; exit 1; }
  for target in "${targets[@]}"; do
    printf '== %s %s (%ss)\n' "$program" "$target" "$SECONDS"
    OMP_WAIT_POLICY=passive "$qemu" -cpu "${cpu[$target]}" "$work/$program" "$target"
  done
done
