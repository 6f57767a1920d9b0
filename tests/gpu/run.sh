#!/usr/bin/env bash
# What a GPU must be able to do, checked and measured in under nine minutes; nothing is fetched.
#
#   tests/gpu/run.sh                        all parts; the table, and <gpu>.json in $OUT (or --out FOLDER)
#   tests/gpu/run.sh --only training        one part (preset, agreement, resume, training, gguf); may be repeated
#   tests/gpu/run.sh --rehearse             the same code on the CPU with tiny shapes
#
# PYTHON names the interpreter (default: python3). A machine that lacks packages and can fetch none gets them from
# tests/gpu/packages.py. To keep a result: put its JSON into bench/results, then
# python -m bench.gpu_results --write README.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root:$here:$root/tests/perf${PYTHONPATH:+:$PYTHONPATH}"
if ! missing=$("$python" -c 'import click, psutil, pydantic, rich, yaml' 2>&1); then
    echo "Error: ${missing##*$'\n'}: pip install -r requirements-gpu.txt, or see tests/gpu/packages.py" >&2
    exit 1
fi
exec "$python" "$here/suite.py" "$@"
