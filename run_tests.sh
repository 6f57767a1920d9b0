#!/usr/bin/env bash
# All tests: ./run_tests.sh            lint and types, unit tests, broad tests and fuzzing, then the whole pipeline
#            ./run_tests.sh --fast     lint, types and unit tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh

times=()
part() { # NAME COMMAND...: run it and keep its time for the end
    local name=$1 started=$SECONDS
    shift
    "$@"
    times+=("$(printf '%3d:%02d  %s' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$name")")
}

# Two tests at a time, each on one thread: more threads than cores would wait for each other in busy loops.
two_lanes() { OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --durations=5 "$@"; }
# The unit tests quantize a few kilobytes, for which compiling our own quantizers would take longer than ggml's take.
unit_tests() { MEDCOT_QUANTIZERS=ggml two_lanes; }

part "lint" "$PYTHON" -m ruff check .
part "format" "$PYTHON" -m ruff format --check .
part "types" "$PYTHON" -m mypy
part "unit tests" unit_tests
if [ "${1:-}" != --fast ]; then
    part "broad tests and fuzzing" two_lanes -m "fuzz or broad"
    # The default run has both cores for itself: its figures are those of the README.
    part "the default run, end to end" "$PYTHON" -m pytest -m e2e --durations=5 tests/e2e/test_pipeline.py
    part "the other end-to-end tests" two_lanes -m "e2e or gpupath" --dist loadfile --ignore tests/e2e/test_pipeline.py
fi
printf '%s\n' "${times[@]}"
