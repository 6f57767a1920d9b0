#!/usr/bin/env bash
# What a GPU must be able to do, checked and measured in under nine minutes; nothing is fetched.
#
#   tests/gpu/run.sh                    the parts that fit into the time, the most important ones first
#   tests/gpu/run.sh --only training    one part (--help lists them); may be repeated
#   tests/gpu/run.sh --rehearse         the same code on the CPU with tiny shapes
#
# In $OUT (or --out FOLDER) are then <gpu>.json, all logs in log.txt, and measurements.tar.gz with pip freeze, nvidia-smi
# and every metric. Two parts are calls of their own, each up to nine minutes:
#
#   tests/gpu/run.sh --only build --llama-source SDIST --llama-built FOLDER     llama.cpp with CUDA, on all cores
#   tests/gpu/run.sh --llama-built FOLDER                                       everything else, with that build
#   tests/gpu/run.sh --only eight_b --llama-built FOLDER                        8B through every stage, next to its plan
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
