#!/usr/bin/env bash
# ptxas of triton 3.6.0 (CUDA 12.8) and 3.9.0 (CUDA 12.9), for sm_90: (x & A) | B with two constants becomes two LOP3, although
# LOP3 computes any function of three inputs. lop3.b32 in the source, with the constants in registers, becomes one.
#
# Expected: the optimizer folds "and" and "or" into one LOP3, as it does for three variables.
# Seen: an instruction holds one 32-bit constant, and ptxas spends a second LOP3 rather than a register that is set once
# outside the loop.
# Why it matters: this very expression turns packed 4-bit weights into floats (the nibble below an exponent), once for each
# two weights. On the integer pipe, which issues at half rate, it doubles the cost of unpacking: 64 instructions of about
# 400 in the inner loop of a 4-bit matrix product.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/a.ptx" <<'PTX'
.version 8.4
.target sm_90
.address_size 64
.visible .entry plain(.param .u64 p) {
  .reg .b64 %a;
  .reg .b32 %x;
  ld.param.u64 %a, [p];
  cvta.to.global.u64 %a, %a;
  ld.global.u32 %x, [%a];
  and.b32 %x, %x, 0x000F000F;
  or.b32 %x, %x, 0x43004300;
  st.global.u32 [%a], %x;
  ret;
}
.visible .entry asked(.param .u64 p) {
  .reg .b64 %a;
  .reg .b32 %x, %mask, %with;
  ld.param.u64 %a, [p];
  cvta.to.global.u64 %a, %a;
  ld.global.u32 %x, [%a];
  mov.u32 %mask, 0x000F000F;
  mov.u32 %with, 0x43004300;
  lop3.b32 %x, %x, %mask, %with, 0xEA;
  st.global.u32 [%a], %x;
  ret;
}
.visible .entry variables(.param .u64 p, .param .u32 mask, .param .u32 with) {
  .reg .b64 %a;
  .reg .b32 %x, %mask, %with;
  ld.param.u64 %a, [p];
  ld.param.u32 %mask, [mask];
  ld.param.u32 %with, [with];
  cvta.to.global.u64 %a, %a;
  ld.global.u32 %x, [%a];
  and.b32 %x, %x, %mask;
  or.b32 %x, %x, %with;
  st.global.u32 [%a], %x;
  ret;
}
PTX
for version in 3.6.0 3.9.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q --disable-pip-version-check --no-deps "triton==$version"
  tools=$(echo "$work/$version"/lib/python3*/site-packages/triton/backends/nvidia/bin)
  "$tools/ptxas" -O3 -arch sm_90 -o "$work/a.cubin" "$work/a.ptx"
  found=""
  for entry in plain asked variables; do
    count=$("$tools/cuobjdump" -sass "$work/a.cubin" 2> /dev/null |
      awk -v name="$entry" '/Function :/ { on = $NF == name } on && / LOP3/ { count++ } END { print count + 0 }')
    found="$found $entry=$count"
  done
  echo "triton $version, $("$tools/ptxas" --version | grep -o 'release [0-9.]*'): LOP3 of$found"
  [ "$found" = " plain=2 asked=1 variables=1" ]
done
echo "as described"
