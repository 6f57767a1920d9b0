"""What exporting an 8B model costs, beside llama.cpp's own two steps in the same run.

    python tests/perf/export_8b.py [--layers 32] [--folder FOLDER] [--llama-cpp SOURCE] [--tokenizer FOLDER]

On a random checkpoint in Llama-3.1-8B's shape (tests/perf/random_checkpoint.py) with a rank-16 adapter: ours from the
16-bit base and from the NF4 base to Q4_K_M, and to two types at once; llama.cpp's convert_hf_to_gguf.py to BF16 and
llama-quantize to Q4_K_M from the 16-bit base, without the merge that they need besides. Prints wall time, peak memory
and the disk that each holds at its peak beside the final file. Every step finds its input out of the page cache. Then
what bounds ours: the disk alone (the same bytes read and written, no work), and each part of the work on one thread.

SOURCE is a llama.cpp checkout; without one, the one inside llama-cpp-python's source distribution is fetched with pip
and its llama-quantize built (cmake and a compiler; once). The whole thing takes 35 GB of disk at 32 layers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from random_checkpoint import save_checkpoint
from threadpoolctl import threadpool_limits

from export.lora import LoraAdapter
from export.quantizers.quantize import quantize
from export.weights import BaseWeights
from pipeline.cache import cache_dir
from pipeline.hardware import usable_cores
from pipeline.memory import keep_freed_memory

SHARED_TOKENIZER = Path("../shared/tokenizers/deepseek-r1-distill-llama-8b")
# GCC 12's AMX code in llama.cpp is wrong (LOG.md, 2026-11-22); quantizing does not use it.
BUILD_OPTIONS = [
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    *(f"-DCMAKE_{each}_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" for each in ("C", "CXX")),
]


@dataclass(frozen=True)
class Cost:
    name: str
    seconds: float
    peak_bytes: int
    disk_bytes: int
    final_bytes: int


def measure(name: str, command: list[str], folder: Path, final: Path) -> Cost:
    """Run a command; ``disk_bytes`` is the most that ``folder`` held beyond what was there before."""
    _forget_cached(folder.parent)
    before, most, running = _size(folder), 0, True

    def watch() -> None:
        nonlocal most
        while running:
            most = max(most, _size(folder) - before)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    running = False
    watcher.join()
    if status != 0:
        sys.exit(f"{name} failed: {errors.decode(errors='replace')[-2000:]}")
    cost = Cost(name, seconds, usage.ru_maxrss * 1024, most, final.stat().st_size)
    beside = max(0, cost.disk_bytes - cost.final_bytes)
    print(
        f"| {name} | {seconds:.0f} | {cost.peak_bytes / 1e9:.2f} | {cost.final_bytes / 1e9:.2f} | {beside / 1e9:.2f} |",
        flush=True,
    )
    return cost


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a temporary file that has gone meanwhile
            continue
    return total


def _forget_cached(folder: Path) -> None:
    """Let the system drop what it keeps of the files in ``folder``, so that every step reads them from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_floor(source: Path, target: Path, written_bytes: int) -> float:
    """Seconds to read the checkpoint ``source`` and write ``written_bytes`` durably at the same time, without work."""
    _forget_cached(source)
    piece = bytes(1 << 22)

    def write() -> None:
        with target.open("wb", buffering=0) as stream:
            for _ in range(written_bytes // len(piece)):
                stream.write(piece)
            os.fsync(stream.fileno())

    started = time.monotonic()
    writer = threading.Thread(target=write)
    writer.start()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.read(len(piece)):
                pass
    writer.join()
    target.unlink()
    return time.monotonic() - started


def print_parts(plain: Path, four_bit: Path) -> None:
    """Nanoseconds of processor time a weight of each part of the work, on one thread, on one large matrix."""
    keep_freed_memory()
    name = "model.layers.0.mlp.up_proj.weight"
    change = LoraAdapter(plain / "adapter").changes[name].low_rank
    assert change is not None
    with (
        threadpool_limits(1),
        BaseWeights(plain / "base") as sixteen,
        BaseWeights(four_bit / "base") as four,
    ):
        rows, columns = sixteen.stored(name).shape
        step = 64
        blocks = [slice(start, start + step) for start in range(0, rows - rows % step, step)]
        values = sixteen.rows(name, blocks[0])
        added = np.empty_like(values)
        packed = quantize(values, GGMLQuantizationType.Q4_K)
        importance = np.square(values).mean(axis=0)
        with tempfile.TemporaryFile(buffering=0) as stream:
            parts: dict[str, Callable[[slice], object]] = {
                "read and widen 16 bit": lambda block: sixteen.rows(name, block),
                "read and look up NF4": lambda block: four.rows(name, block),
                "adapter's product": lambda block: change.rows(block),
                "adding it": lambda block: np.add(values, values, out=added),
                "Q4_K": lambda block: quantize(values, GGMLQuantizationType.Q4_K),
                "Q4_K with an importance matrix": lambda block: quantize(values, GGMLQuantizationType.Q4_K, importance),
                "Q6_K": lambda block: quantize(values, GGMLQuantizationType.Q6_K),
                "Q8_0": lambda block: quantize(values, GGMLQuantizationType.Q8_0),
                "write Q4_K": lambda block: stream.write(packed.data),
            }
            print("\n| part, one thread | ns a weight |\n| --- | ---: |")
            for part, work in parts.items():
                seconds = min(_processor_seconds(work, blocks) for _ in range(4))
                print(f"| {part} | {seconds / (len(blocks) * step * columns) * 1e9:.2f} |")


def _processor_seconds(work: Callable[[slice], object], blocks: list[slice]) -> float:
    started = time.process_time()
    for block in blocks:
        work(block)
    return time.process_time() - started


def ours(base: Path, adapter: Path, out: Path, *quantizations: str) -> list[str]:
    options = [option for quantization in quantizations for option in ("--quant", quantization)]
    command = [sys.executable, "-m", "pipeline.cli", "export", "--base", str(base), "--adapter", str(adapter)]
    return [*command, "--out", str(out), *options, "--no-verify"]


def llama_cpp(source: Path | None) -> tuple[Path, Path]:
    """(convert_hf_to_gguf.py, llama-quantize), fetched and built where there are none."""
    if source is None:
        version = importlib.metadata.version("llama-cpp-python")
        folder = cache_dir() / "llama.cpp" / version
        source = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
        if not source.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            wanted = ["--no-deps", "--no-binary", ":all:", f"llama-cpp-python=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "download", *wanted, "-d", str(folder)], check=True)
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
    build = source / "build"
    binary = build / "bin" / "llama-quantize"
    if not binary.is_file():
        subprocess.run(["cmake", "-S", str(source), "-B", str(build), *BUILD_OPTIONS], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "llama-quantize", "-j", "2"], check=True)
    return source / "convert_hf_to_gguf.py", binary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "medcot-export")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=SHARED_TOKENIZER)
    arguments = parser.parse_args()
    convert, quantize = llama_cpp(arguments.llama_cpp)
    threads = str(usable_cores())
    folder = arguments.folder
    plain, four_bit, out = folder / "bf16", folder / "nf4", folder / "out"
    for target, nf4 in ((plain, False), (four_bit, True)):
        if not (target / "adapter" / "adapter_config.json").is_file():
            save_checkpoint(target, arguments.layers, nf4=nf4, tokenizer=arguments.tokenizer)
    out.mkdir(parents=True, exist_ok=True)

    print(f"{arguments.layers} layers of Llama-3.1-8B, rank 16, {threads} threads\n")
    print("| step | seconds | peak GB | result GB | disk beside it GB |")
    print("| --- | ---: | ---: | ---: | ---: |")

    def run(name: str, command: list[str], final: str, *remove: str) -> Cost:
        cost = measure(name, command, out, out / final)
        for each in (final, *remove):
            (out / each).unlink()
        return cost

    single = "model-Q4_K_M.gguf"
    from_16 = run("medcot, 16-bit base to Q4_K_M", ours(plain / "base", plain / "adapter", out, "Q4_K_M"), single)
    from_4 = run("medcot, NF4 base to Q4_K_M", ours(four_bit / "base", four_bit / "adapter", out, "Q4_K_M"), single)
    q8 = run("medcot, 16-bit base to Q8_0", ours(plain / "base", plain / "adapter", out, "Q8_0"), "model-Q8_0.gguf")
    both = run(
        "medcot, 16-bit base to Q4_K_M and Q8_0 at once",
        ours(plain / "base", plain / "adapter", out, "Q4_K_M", "Q8_0"),
        single,
        "model-Q8_0.gguf",
    )
    bf16 = out / "bf16.gguf"
    converting = [sys.executable, str(convert), str(plain / "base"), "--outtype", "bf16", "--outfile", str(bf16)]
    converted = measure("llama.cpp convert_hf_to_gguf.py to BF16", converting, out, bf16)
    quantizing = [str(quantize), str(bf16), str(out / "theirs.gguf"), "Q4_K_M", threads]
    quantized = measure("llama-quantize BF16 to Q4_K_M", quantizing, out, out / "theirs.gguf")
    for path in (bf16, out / "theirs.gguf"):
        path.unlink()

    theirs = converted.seconds + quantized.seconds
    print(f"\nllama.cpp's two steps: {theirs:.0f} s, and {converted.final_bytes / 1e9:.1f} GB of BF16 between them")
    print(f"ours / theirs: {from_16.seconds / theirs:.2f} from 16 bit, {from_4.seconds / theirs:.2f} from NF4")
    print(f"two types at once / one after the other: {both.seconds / (from_16.seconds + q8.seconds):.2f}")
    for kind, checkpoint in (("16-bit", plain), ("NF4", four_bit)):
        floor = disk_floor(checkpoint / "base", out / "floor", from_16.final_bytes)
        print(f"the disk alone, {kind} base: {floor:.0f} s")
    print_parts(plain, four_bit)


if __name__ == "__main__":
    main()
