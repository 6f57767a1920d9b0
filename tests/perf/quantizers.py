"""How fast the quantizers are beside ggml's, on one thread and on several, and how near to the memory's own speed.

    python tests/perf/quantizers.py [--type Q4_K --type Q6_K] [--threads 2] [--repeats 15]

Gaussian weights; ggml and ours alternate in one process in turns of some 50 ms, and the fastest turn counts. Time is
the threads' own CPU time: what other programs take is not in it. Each type with and without an importance matrix,
first as numba compiles for this CPU, then in a child process for Haswell, which has AVX2 and no AVX-512. Share of
bandwidth: bytes read and written a second, of those that copying large arrays reaches on as many threads. Prints
tables in million weights a second, each followed by one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from gguf import GGMLQuantizationType as T

from export import ggml
from export.quantizers.choice import families

COLUMNS = 4096
WEIGHTS = 1 << 24  # more than a core's caches hold
OUR_TURN, GGMLS_TURN = 1 << 22, 1 << 17  # weights
COPIED = 1 << 26  # float32
AVX2_ONLY = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}


@dataclass(frozen=True)
class Speed:
    """Million weights a second; ``bandwidth_share`` is ours."""

    type: str
    importance: bool
    threads: int
    ggml: float
    ours: float
    bandwidth_share: float


def seconds(work: Callable[[slice], None], chosen: range, parts: int, threads: int) -> float:
    """How long ``work`` keeps each of ``threads`` busy over the rows ``chosen``, shared out in ``parts``."""
    step = len(chosen) // parts

    def timed(start: int) -> float:
        started = time.thread_time()
        work(slice(start, start + step))
        return time.thread_time() - started

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(timed, chosen[::step])) / threads


def copied_bytes_per_second(threads: int, repeats: int) -> float:
    source, target = np.ones(COPIED, dtype=np.float32), np.zeros(COPIED, dtype=np.float32)

    def copy(part: slice) -> None:
        target[part] = source[part]

    fastest = min(seconds(copy, range(COPIED), 64, threads) for _ in range(repeats))
    return (source.nbytes + target.nbytes) / fastest


def measure(ggml_type: T, guided: bool, threads: int, repeats: int, bandwidth: float) -> Speed:
    random = np.random.default_rng(0)
    rows = (0.02 * random.standard_normal(WEIGHTS, dtype=np.float32)).reshape(-1, COLUMNS)
    importance = random.uniform(size=COLUMNS).astype(np.float32) if guided else None
    packed = np.empty((len(rows), ggml.row_bytes(ggml_type, COLUMNS)), dtype=np.uint8)
    kernel = families()[ggml_type]

    def ours(part: slice) -> None:
        if importance is None:
            assert kernel.plain
            kernel.plain(rows[part], packed[part])
        else:
            assert kernel.guided
            kernel.guided(rows[part], importance, packed[part])

    def ggmls(part: slice) -> None:
        ggml.quantize_rows(rows[part], importance, packed[part], ggml_type)

    ours(slice(16))  # compiles
    best_ours, best_ggml = float("inf"), float("inf")
    for repeat in range(repeats):
        start = repeat * OUR_TURN // COLUMNS % len(rows)
        best_ours = min(best_ours, seconds(ours, range(start, start + OUR_TURN // COLUMNS), 16, threads))
        best_ggml = min(best_ggml, seconds(ggmls, range(start, start + GGMLS_TURN // COLUMNS), 8, threads))
    return Speed(
        type=ggml_type.name,
        importance=guided,
        threads=threads,
        ggml=GGMLS_TURN / best_ggml / 1e6,
        ours=OUR_TURN / best_ours / 1e6,
        bandwidth_share=(rows.nbytes + packed.nbytes) * OUR_TURN / WEIGHTS / best_ours / bandwidth,
    )


def measure_all(types: list[T], threads: list[int], repeats: int) -> None:
    """Print a table for this process's CPU settings, then its speeds as JSON."""
    from numba.core.registry import cpu_target

    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    measured = []
    bandwidth = {count: copied_bytes_per_second(count, repeats) for count in threads}
    copies = ", ".join(f"{bandwidth[count] / 1e9:.1f} GB/s on {count}" for count in threads)
    print(f"\nCompiled for {cpu}, {'with' if '+avx512f' in features else 'without'} AVX-512. Copying: {copies}.\n")
    print("| type | importance | threads | ggml, Mw/s | ours, Mw/s | ratio | share of bandwidth |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for ggml_type in types:
        kernel = families()[ggml_type]
        for guided in [False] * bool(kernel.plain) + [True] * bool(kernel.guided):
            for count in threads:
                each = measure(ggml_type, guided, count, repeats, bandwidth[count])
                measured.append(asdict(each))
                print(
                    f"| {each.type} | {'yes' if guided else 'no'} | {count} | {each.ggml:.1f} | {each.ours:.1f} | "
                    f"{each.ours / each.ggml:.1f} | {each.bandwidth_share:.0%} |",
                    flush=True,
                )
    print(json.dumps({"cpu": cpu, "copied_bytes_per_second": bandwidth, "speeds": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--type", action="append", choices=[each.name for each in families()], help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="beside one (default: 2)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    types = [T[name] for name in chosen.type or [each.name for each in families()]]
    measure_all(types, sorted({1, chosen.threads}), chosen.repeats)
    if not chosen.child:
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        subprocess.run(command, env={**os.environ, **AVX2_ONLY}, check=True)


if __name__ == "__main__":
    main()
