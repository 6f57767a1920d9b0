#!/usr/bin/env bash
# All tests: ./run_tests.sh            lint and types, unit tests, broad tests and fuzzing, then the whole pipeline
#            ./run_tests.sh --fast     without the last two parts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Two tests at a time, each on one thread: more threads than cores would wait for each other in busy loops. The unit tests
# quantize a few kilobytes, for which compiling our own quantizers would take longer than ggml's take.
OMP_NUM_THREADS=1 MEDCOT_QUANTIZERS=ggml "$PYTHON" -m pytest -n 2 --durations=5
if [ "${1:-}" != --fast ]; then
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "fuzz or broad" -n 2 --durations=5
    "$PYTHON" -m pytest -m e2e --durations=5
fi
