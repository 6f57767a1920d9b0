#!/usr/bin/env bash
# All tests: ./run_tests.sh            lint and types, unit tests, then the whole pipeline on the real small model
#            ./run_tests.sh --fast     without the last part
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
if [ "${1:-}" = --fast ]; then
    exec "$PYTHON" -m pytest --durations=5
fi
exec "$PYTHON" -m pytest -m "e2e or not e2e" --durations=10
