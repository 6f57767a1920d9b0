#!/usr/bin/env bash
# Whether requirements-gpu.txt fits beside the PyTorch that Kaggle and Colab bring: a resolver's dry run, nothing is installed.
#
#   scripts/resolve_gpu_requirements.sh                        the versions below
#   scripts/resolve_gpu_requirements.sh 2.11.0 [2.12.1 ...]    others
#   PYTHON_VERSIONS=3.12 OVERRIDES=certifi scripts/resolve_gpu_requirements.sh
#
# OVERRIDES names packages whose declared versions do not count, where an index lags behind: Unsloth 2026.10.9 asks for a
# certifi that a mirror may not have yet.
#
# Looked up on 2026-11-30, in stored copies that may be months old:
#   Colab's GPU image: Python 3.13, torch 2.11.0+cu128, torchao 0.10 (github.com/googlecolab/backend-info, August 2026);
#     its past runtimes 2026.01 and 2025.10: Python 3.12, torch 2.9.0 and 2.8.0 (README of the same repository).
#   Kaggle's image is built on Colab's of May: Python 3.12, torch 2.10.0+cu128, kernels from sm_70 on
#     (github.com/Kaggle/docker-python/issues/1546 of March 2026; torch 2.11's begin at sm_75).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v uv >/dev/null || { echo "Error: uv is needed to resolve without installing: pip install uv." >&2; exit 1; }
[ $# -gt 0 ] || set -- 2.10.0 2.11.0
failed=0
pin=$(mktemp)
overrides=$(mktemp)
trap 'rm -f "$pin" "$overrides"' EXIT
tr ' ' '\n' <<<"${OVERRIDES:-}" >"$overrides"
for python in ${PYTHON_VERSIONS:-3.12 3.13}; do
    for torch in "$@"; do
        echo "torch==$torch" >"$pin"
        if resolved=$(uv pip compile --quiet --no-header --no-annotate --python-version "$python" \
            --python-platform x86_64-manylinux_2_28 --constraint "$pin" --override "$overrides" "$root/requirements-gpu.txt" 2>&1); then
            beside=$(grep -E '^(numpy|torchao|torchvision|triton|xformers)==' <<<"$resolved" | paste -sd ' ')
            echo "ok      Python $python, torch $torch: $(grep -c == <<<"$resolved") packages, $beside"
        else
            echo "FAILED  Python $python, torch $torch:"
            echo "$resolved"
            failed=1
        fi
    done
done
exit $failed
