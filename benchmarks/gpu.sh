#!/usr/bin/env bash
# Builds, proves and measures the CUDA kernels on a machine with a GPU: Python, torch with CUDA and nvcc are there
# already, and nothing is fetched. Every stage ends within 8 minutes; run again, it goes on where it ended.
#
# Usage: benchmarks/gpu.sh STAGE [--from K] [--out FOLDER] [--wheels FOLDER]
#   build     compile with CUDA for this machine's torch, install peers' wheels from FOLDER, say what was built
#   test      the tests marked `cuda`, a file at a time; files that passed with these sources are not run again
#   sanitize  compute-sanitizer's memcheck and racecheck on a small set of calls
#   core      the cells that matter most, with all peers; a results file and its tables
#   grid      windows 128 to 4096 over lengths 2k to 128k, from cell K on
#   table     the tables of the results file as it is
# With LONGATTN_HOPPER=1 the same of the kernels for compute capability 9.0, into files of their own; so with each value
# of LONGATTN_HOPPER_BACKWARD.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
  sed -n '2,14s/^# \?//p' "$0" >&2
  exit 2
fi
stage=$1
shift
out=longattn-bench
wheels=
bench=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2 ;;
    --wheels) wheels=$2 ;;
    --from | --seconds) bench+=("$1" "$2") ;;
    --device) bench+=("$1" "$2") ;; # cpu: tiny cells, to try this script out
    *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
  esac
  shift 2
done
python=${PYTHON:-python3}
limit=470 # seconds
family=${LONGATTN_HOPPER:+-hopper}${LONGATTN_HOPPER_BACKWARD:+-$LONGATTN_HOPPER_BACKWARD}
mkdir -p "$out/logs"
exec > >(tee -a "$out/logs/$stage.log") 2>&1
echo "== $stage, $(date -u +%FT%TZ)"
nvidia-smi || echo "no nvidia-smi here"

build() {
  export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  "$CUDA_HOME/bin/nvcc" --version | tail -2
  if [ -n "$wheels" ]; then
    "$python" -m pip install --no-index --no-deps "$wheels"/*.whl
  fi
  LONGATTN_BUILD=cuda MAX_JOBS=$(nproc) timeout "$limit" \
    "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
  "$python" -m longattn.info
}

tests() {
  local begin=$SECONDS file mark failed=0
  for file in tests/test_cuda_*.py; do
    mark=$out/logs/passed-$(basename "$file" .py)$family
    if [ -f "$mark" ] && [ -z "$(find csrc longattn tests \( -name '*.py' -o -name '*.so' \) -newer "$mark" -print -quit)" ]; then
      echo "$file: passed before"
      continue
    fi
    if [ $((limit - SECONDS + begin)) -le 20 ]; then
      echo "time is up: run this again"
      return 1
    fi
    # 5: a file without tests that need a GPU
    if LONGATTN_REQUIRE_C=cuda timeout "$((limit - SECONDS + begin))" \
      "$python" -m pytest -m cuda -q -rs -p no:cacheprovider --durations=5 "$file" || [ $? -eq 5 ]; then
      touch "$mark"
    else
      failed=1
    fi
  done
  return $failed
}

sanitize() {
  local tool=${SANITIZER:-compute-sanitizer} check log
  if ! command -v "$tool" >/dev/null; then
    echo "not run: no compute-sanitizer here"
    return
  fi
  for check in memcheck racecheck; do
    log=$out/logs/sanitize-$check$family.txt
    # Without torch's caching, every tensor is an allocation of its own, whose ends are known.
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$((limit / 2))" \
      "$tool" --tool "$check" --error-exitcode 9 "$python" tests/cuda_small_set.py cuda >"$log" 2>&1; then
      echo "$check: $(grep -E 'calls on cuda|SUMMARY' "$log" | tr '\n' ' ')"
    elif grep -qiE 'device not supported|not supported on this|unable to (launch|attach)|debugger is not' "$log"; then
      echo "$check: not run, the tool refuses this device: $(grep -iE 'not supported|unable|debugger' "$log" | head -1)"
    else
      tail -40 "$log"
      echo "$check: FAILED, all of it in $log"
      return 1
    fi
  done
}

case $stage in
  build) build ;;
  test) tests ;;
  sanitize) sanitize ;;
  core | grid | table) timeout "$limit" "$python" -m longattn.bench.gpu "$stage" --out "$out" "${bench[@]}" ;;
  *) echo "gpu.sh: unknown stage $stage" >&2; exit 2 ;;
esac
