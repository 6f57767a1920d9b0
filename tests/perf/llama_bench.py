r"""Our prompt and generation speeds beside llama.cpp's own llama-bench, on the same file, in turns.

    python tests/perf/llama_bench.py MODEL.gguf --llama-bench build/bin/llama-bench [--rounds 40] [--depth 2048]

Build llama-bench from the llama.cpp that llama-cpp-python was built from (vendor/llama.cpp in its source distribution),
and link it again to the very libraries that are installed, so that methods are compared and not compilers:

    cmake -S vendor/llama.cpp -B build -G Ninja -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF
    cmake --build build --target llama-bench
    cd build && g++ -o llama-bench tools/llama-bench/CMakeFiles/llama-bench.dir/main.cpp.o \
        tools/llama-bench/libllama-bench-impl.a common/libllama-common.a common/libllama-common-base.a \
        vendor/cpp-httplib/libcpp-httplib.a -L$LIB -Wl,-rpath,$LIB -lllama -lggml -lggml-cpu -lggml-base -lgomp
    # LIB is the folder llama_cpp/lib in site-packages

In every round each side loads the file once and makes one repeat of each test, and the next round goes the other way
round. What counts is the median over rounds of their ratios: a slow minute of the machine hits both sides of a ratio.
Exit status 1 where it is off by more than 3 %, and 2 where its 95 % interval (bootstrap) leaves
room for 6 %: more rounds tell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.speed import probe
from bench.speed_probe import ProbeRequest
from pipeline.hardware import usable_cores

_TOLERANCE = 0.03
Floats = npt.NDArray[np.float64]
Rates = dict[str, float]  # test -> tokens per second


def ours(arguments: argparse.Namespace) -> Rates:
    request = ProbeRequest(
        label=arguments.model.name,
        path=arguments.model,
        threads=arguments.threads,
        prompt_tokens=arguments.prompt,
        generated_tokens=arguments.generate,
        repeats=1,
        depths=tuple(arguments.depth),
    )
    return {test.name: test.tokens_per_second[0] for test in probe(request).tests}


def theirs(arguments: argparse.Namespace) -> Rates:
    depths = ",".join(map(str, [0, *arguments.depth]))
    command = [
        arguments.llama_bench, "-m", arguments.model, "-p", arguments.prompt, "-n", arguments.generate, "-d", depths,
        "-t", arguments.threads, "-r", 1, "-ngl", 0, "-fa", "off", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{arguments.llama_bench} failed: {done.stderr.strip()[-500:]}")
    rates = {}
    for test in json.loads(done.stdout):
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        rates[name + (f" @ d{test['n_depth']}" if test["n_depth"] else "")] = test["samples_ts"][0]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--depth", type=int, action="append", default=[])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    sides = {"medcot": ours, "llama-bench": theirs}
    rates: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in sides}
    for number in range(arguments.rounds):
        for side in sorted(sides, reverse=bool(number % 2)):
            for test, rate in sides[side](arguments).items():
                rates[side][test].append(rate)
                print(f"{number + 1}/{arguments.rounds} {side} {test} {rate:.2f}", file=sys.stderr)
    statuses = [0]
    print(f"{arguments.model.name}, {arguments.threads} threads, {arguments.rounds} rounds\n")
    print("| test | medcot, tokens/s | llama-bench | median ratio (95 % interval) |\n| --- | ---: | ---: | ---: |")
    for test in rates["medcot"]:
        own, other = np.array(rates["medcot"][test]), np.array(rates["llama-bench"][test])
        ratio = float(np.median(own / other))
        resampled = np.random.default_rng(0).choice(own / other, (2000, len(own)))
        low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
        if abs(ratio - 1) > _TOLERANCE:
            statuses.append(1)
        elif max(1 - low, high - 1) > 2 * _TOLERANCE:
            statuses.append(2)
        print(f"| {test} | {_shown(own)} | {_shown(other)} | {ratio:.3f} ({low:.3f} to {high:.3f}) |")
    print(json.dumps(rates))
    sys.exit(max(statuses))


def _shown(rates: Floats) -> str:
    return f"{np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f}"


if __name__ == "__main__":
    main()
