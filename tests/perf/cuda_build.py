"""llama-cpp-python built with CUDA on a machine without a GPU, by set-up's own code, and loaded: it counts 0 devices.

    python -m pip install --no-deps --target TOOLKIT nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \\
        nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 'nvidia-cuda-cccl<13.1' nvidia-cublas==13.1.0.3
    python tests/perf/cuda_build.py TOOLKIT [--architectures 75] [--jobs 2] [--work FOLDER]

The CUDA compiler comes from PyPI (all packages of one minor version; 2 GB). Builds as set-up does: first for the
CPU, then with CUDA in the same folder, which spares the second ggml's CPU part. Prints the wall and the processor
time of each, as one JSON line a build.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline import llama_build  # noqa: E402

LOAD = """
import ctypes, pathlib, llama_cpp
llama_cpp.llama_backend_init()
library = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib/libggml-cuda.so"))
print(library.ggml_backend_cuda_get_device_count(), bool(llama_cpp.llama_supports_gpu_offload()))
"""


def toolkit_from_packages(target: Path) -> Path:
    """NVIDIA's folder in ``target``, with the names that CMake and the linker look for."""
    home = next(target.glob("nvidia/cu*"))
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")
    for library in (home / "lib").glob("lib*.so.*"):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
    for tool in (*(home / "bin").iterdir(), *home.glob("nvvm/bin/*")):
        if tool.is_file():
            tool.chmod(0o755)
    return home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toolkit", type=Path)
    parser.add_argument("--architectures", default="75", help="one or more, separated by commas")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--work", type=Path, default=Path("cuda-build"))
    options = parser.parse_args()
    home = toolkit_from_packages(options.toolkit.resolve())
    work: Path = options.work.resolve()
    os.environ["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"] = str(home / "lib")
    # No driver, so no libcuda to link with: what would need it is left out.
    os.environ["CMAKE_ARGS"] = f"-DCUDAToolkit_ROOT={home} -DGGML_CUDA_NO_VMM=ON"
    on_cpu = llama_build.cpu_recipe(ROOT / "requirements-gpu.txt")
    nvcc = llama_build.find_nvcc()
    release = llama_build.cuda_release(nvcc) if nvcc else None
    if nvcc is None or release is None:
        sys.exit(f"Error: {home / 'bin' / 'nvcc'} does not run: install the packages above into {options.toolkit}.")
    with_cuda = llama_build.with_cuda(on_cpu, options.architectures.split(","), nvcc, release)
    source = llama_build.fetch_source(on_cpu.version, work)
    wheel = None
    for recipe in (on_cpu, with_cuda):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        wheel = llama_build.Build(recipe, source, work, parallel=options.jobs, nice=True).wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({
            "build": recipe.title, "cmake_arguments": recipe.cmake_arguments, "wheel_bytes": wheel.stat().st_size,
            "wall_minutes": round((time.monotonic() - started) / 60, 1), "processor_minutes": round(processor / 60, 1),
        }), flush=True)  # fmt: skip
    assert wheel is not None
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(work / "loaded")
        print(json.dumps({"libggml-cuda.so bytes": packed.getinfo(llama_build.LIBRARY).file_size}))
    environ = os.environ | {"PYTHONPATH": f"{work / 'loaded'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told = subprocess.run([sys.executable, "-c", LOAD], env=environ, capture_output=True, text=True, check=True)
    print(json.dumps({"devices, offloads": told.stdout.strip(), "told": told.stderr.strip()[-300:]}))


if __name__ == "__main__":
    main()
