# Sourced by the GPU scripts: options, time limits, installation, and a tar file with all results.
# After a failing step, the next one still runs. The tar file is always written, and the last line is a summary.
#   NAME, TOTAL   must be set before: the script's name, and its time limit in seconds
#   limited SECONDS STEP COMMAND...   runs a command with a time limit; output goes to the terminal and to STEP.txt
set -uo pipefail
python=${PYTHON:-python3}
out=gpu-results wheels=.whl dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --out | --wheels) [ $# -gt 1 ] || { echo "$1: must be followed by a folder" >&2; exit 2; } ;;&
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --dry-run) dry=--dry-run; shift ;;
    *) echo "$1: unknown option" >&2; sed -n '2,/^[^#]/{/^#/p}' "bench/$NAME.sh" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" || { echo "--out $out: must be a folder, or a path where one can be created" >&2; exit 2; }
command -v "$python" > /dev/null || { echo "PYTHON=$python: must be a Python executable; paths are relative to $PWD" >&2; exit 2; }
out=$(cd "$out" && pwd)
work=$(mktemp -d)
results=$work/results site=$work/site
mkdir "$results" "$site"
export PYTHONUNBUFFERED=1 PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/nybble-triton}
said=() failed=0

finish() {
  tar -czf "$out/$NAME.tar.gz" -C "$results" . || failed=1
  rm -rf "$work"
  echo "$NAME: $(printf '%s, ' "${said[@]}")$SECONDS s of $TOTAL, $out/$NAME.tar.gz"
  exit "$failed"
}
trap finish EXIT
trap 'failed=1; exit' INT TERM

limited() {
  local seconds=$1 step=$2 code
  shift 2
  local left=$((TOTAL - SECONDS - 5))
  seconds=$((seconds < left ? seconds : left))
  printf '\n== %s (%ss, at most %ss)\n' "$step" "$SECONDS" "$seconds"
  if [ "$seconds" -lt 1 ]; then
    said+=("$step: no time left"); failed=1
    return 1
  fi
  timeout -k 3 "$seconds" "$@" 2>&1 | tee "$results/$step.txt"
  code=${PIPESTATUS[0]}
  case $code in
    0) said+=("$step ok") ;;
    124 | 137) said+=("$step took more than $seconds s"); failed=1 ;;
    *) said+=("$step failed ($code)"); failed=1 ;;
  esac
  return "$code"
}

if [ -n "$dry" ]; then
  export TRITON_INTERPRET=1
  # An empty wheel: the real ones are for another Python, and nybble is already importable.
  wheels=$work/wheels
  "$python" -m bench.gpu_wheels "$wheels" --empty || { said+=("no wheel for the dry run"); failed=1; exit; }
elif ! compgen -G "$wheels/*.whl" > /dev/null; then
  echo "--wheels $wheels: contains no wheels; run bench/gpu_prepare.sh on a machine with nvcc" >&2
  said+=("no wheels"); failed=1
  exit
fi
limited 40 install "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
  --target "$site" "$wheels"/*.whl || exit
if command -v nvidia-smi > /dev/null; then nvidia-smi -q -d CLOCK,POWER > "$results/nvidia-smi.txt"; fi
