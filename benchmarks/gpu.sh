#!/usr/bin/env bash
# On a machine with a GPU: builds, tests, looks for races and stray accesses, times and profiles. In less than 9 minutes,
# without a network, from a source tree; needs torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest.
#
#   benchmarks/gpu.sh [--dry-run] [--only STAGE,…] [--binaries DIR] [--wheels DIR]
#
#   --dry-run        says what would run
#   --only           some of the stages: check build exercise tests benchmark sanitizers profile others
#   --binaries DIR   takes _C*.so, _C_cuda.version and _tasks*.so from there, and builds nothing
#   --wheels DIR     Python packages that the machine lacks
#
# Environment: PYTHON, OUT (results and logs, default runs/gpu), SECONDS_IN_ALL (530), METAREC_CUDA_ARCHITECTURES (that
# of the GPU). A stage that fails or takes too long is reported, and the next one runs; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
BUILD=build/gpu
LOGS=build/gpu-logs
dry=0 only="" binaries="" wheels=""
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --only) only=",$2," && shift ;;
    --binaries) binaries=$2 && shift ;;
    --wheels) wheels=$2 && shift ;;
    *) echo "gpu.sh: unknown option $1" >&2 && exit 2 ;;
  esac
  shift
done

summary=() failed=0 began=$SECONDS
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="/usr/local/cuda/bin:$PATH"

wanted() { [ -z "$only" ] || [[ $only == *",$1,"* ]]; }

# report NAME CODE SECONDS: what became of a stage, on the screen and for the end.
report() {
  local result=ok
  case $2 in
    0) ;;
    124 | 137) result="FAILED: took longer than it may" ;;
    *) result="FAILED: exit status $2" ;;
  esac
  [ "$2" -eq 0 ] || failed=1
  summary+=("| $1 | $result | $3 |")
  echo "--- $1: $result, $3 s"
  tar -czf "$OUT/logs.tar.gz" -C "$LOGS" . 2>/dev/null
}

# run NAME LIMIT LINES COMMAND…: one stage; shows the last LINES of what it says.
run() {
  local name=$1 limit=$2 lines=$3 left=$((SECONDS_IN_ALL - SECONDS + began)) start=$SECONDS code
  shift 3
  if [ "$dry" -eq 1 ]; then
    echo "$name, at most $limit s: $*"
    return
  fi
  if [ "$left" -lt 10 ]; then
    echo "=== $name: no time left"
    report "$name" 124 0
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "=== $name: $*"
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  tail -n "$lines" "$LOGS/$name.log"
  report "$name" "$code" $((SECONDS - start))
}

# watch TOOL: compute-sanitizer on small shapes; only our kernels, but initcheck has to see who else writes.
watch() {
  local kernels=(--kernel-name kernel_substring=metarec_fast)
  [ "$1" != initcheck ] || kernels=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
    "${kernels[@]}" "$PYTHON" tests/exercise_gpu.py --small >"$LOGS/$1.log" 2>&1
}

sanitizers() {
  local tools=(memcheck racecheck synccheck initcheck) left=$((SECONDS_IN_ALL - SECONDS + began)) limit=90
  local start=$SECONDS pids=() codes=() i
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$dry" -eq 1 ]; then
    echo "${tools[*]}, side by side, at most $limit s: compute-sanitizer --tool … $PYTHON tests/exercise_gpu.py --small"
    return
  fi
  echo "=== compute-sanitizer: ${tools[*]}"
  if [ "$left" -lt 10 ] || ! command -v compute-sanitizer >/dev/null; then
    command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit"
    for i in "${tools[@]}"; do report "$i" 127 0; done
    return
  fi
  for i in "${tools[@]}"; do
    watch "$i" "$limit" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do
    wait "$i"
    codes+=($?)
  done
  for i in "${!tools[@]}"; do
    grep -E "SUMMARY|cases on" "$LOGS/${tools[$i]}.log" || tail -n 5 "$LOGS/${tools[$i]}.log"
    report "${tools[$i]}" "${codes[$i]}" $((SECONDS - start))
  done
}

if [ "$dry" -eq 0 ]; then
  mkdir -p "$OUT" "$LOGS" || exit 1
  rm -f "$LOGS"/*.log
fi
if [ -n "$wheels" ]; then
  run wheels 60 3 "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target build/gpu-site "$wheels"/*.whl
  export PYTHONPATH="$PWD/build/gpu-site:$PYTHONPATH"
fi

wanted check && run check 60 40 "$PYTHON" -m benchmarks.gpu_check

if wanted build && [ -n "$binaries" ]; then
  run build 60 5 bash -ec "cp -f '$binaries'/*.so '$binaries'/_C_cuda.version metarec_fast/
    '$PYTHON' -m benchmarks.gpu_check --loaded"
elif wanted build; then
  architectures=${METAREC_CUDA_ARCHITECTURES:-}
  [ -n "$architectures" ] || architectures=$("$PYTHON" -m benchmarks.gpu_check --architecture 2>/dev/null || echo 90)
  run build 240 5 bash -ec "cmake -S . -B $BUILD -G Ninja -DPython_EXECUTABLE=\"\$(command -v '$PYTHON')\" \
      -DMETAREC_CUDA=ON -DMETAREC_CUDA_ARCHITECTURES='$architectures'
    cmake --build $BUILD
    cmake --install $BUILD --strip --prefix metarec_fast
    '$PYTHON' -m benchmarks.gpu_check --loaded"
fi

wanted exercise && run exercise 60 5 "$PYTHON" tests/exercise_gpu.py --fill

# -W default: a warning of another torch than the one at home is shown, and is no failure.
several=()
[ "$dry" -eq 1 ] || ! "$PYTHON" -c "import xdist" 2>/dev/null || several=(-n 6)
wanted tests && run tests 180 15 "$PYTHON" -m pytest --device cuda --about device -W default "${several[@]}"

wanted benchmark && run benchmark 190 400 "$PYTHON" -m benchmarks.gpu --seconds 150 --out "$OUT"

wanted sanitizers && sanitizers

wanted profile && run profile 60 30 bash -ec "
  ncu --profile-from-start off --clock-control none --kernel-name-base demangled --kernel-name regex:metarec_fast \
      --section SpeedOfLight --section LaunchStats --section Occupancy --csv --page details \
      --log-file '$OUT/ncu.csv' '$PYTHON' -m benchmarks.gpu --profile
  '$PYTHON' -m benchmarks.ncu '$OUT/ncu.csv'"

wanted others && run others 120 10 "$PYTHON" -m pytest --about rest -W default --ignore tests/test_simulator.py \
  --ignore-glob 'tests/test_cuda_*.py' "${several[@]}"

[ "$dry" -eq 0 ] || exit 0
{
  echo "| stage | result | seconds |"
  echo "|---|---|---:|"
  printf '%s\n' "${summary[@]}"
} | tee "$OUT/summary.md"
exit "$failed"
