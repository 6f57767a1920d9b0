"""Our prompt and generation speeds beside llama.cpp's own llama-bench, on the same file, in turns.

    python tests/perf/llama_bench.py MODEL.gguf --llama-bench llama.cpp/build/bin/llama-bench [--depth 2048]

Build llama-bench from the llama.cpp that llama-cpp-python was built from (vendor/llama.cpp in its source distribution),
for the same instructions; GCC 12.2 miscompiles AMX, which llama-cpp-python's build leaves out too:

    F="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    cmake -S vendor/llama.cpp -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DCMAKE_C_FLAGS="$F" -DCMAKE_CXX_FLAGS="$F"
    cmake --build build --target llama-bench llama-perplexity

Exit status 1 where the means differ by more than 3 %. The machine has to be quiet: the spread of the rounds tells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.speed import probe
from bench.speed_probe import ProbeRequest
from pipeline.hardware import usable_cores

_TOLERANCE = 0.03
Rates = dict[str, list[float]]  # test -> tokens per second, one value per repeat


def ours(arguments: argparse.Namespace) -> Rates:
    request = ProbeRequest(
        label=arguments.model.name,
        path=arguments.model,
        threads=arguments.threads,
        prompt_tokens=arguments.prompt,
        generated_tokens=arguments.generate,
        repeats=arguments.repeats,
        depths=tuple(arguments.depth),
    )
    return {test.name: test.tokens_per_second for test in probe(request).tests}


def theirs(arguments: argparse.Namespace) -> Rates:
    depths = ",".join(map(str, [0, *arguments.depth]))
    command = [
        arguments.llama_bench, "-m", arguments.model, "-p", arguments.prompt, "-n", arguments.generate, "-d", depths,
        "-t", arguments.threads, "-r", arguments.repeats, "-ngl", 0, "-fa", "off", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{arguments.llama_bench} failed: {done.stderr.strip()[-500:]}")
    rates = {}
    for test in json.loads(done.stdout):
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        rates[name + (f" @ d{test['n_depth']}" if test["n_depth"] else "")] = test["samples_ts"]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--depth", type=int, action="append", default=[])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="Of both in turns, the one first that was second before.")
    arguments = parser.parse_args()
    sides = {"medcot": ours, "llama-bench": theirs}
    rounds: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in sides}
    for number in range(arguments.rounds):
        for side in sorted(sides, reverse=bool(number % 2)):
            for test, samples in sides[side](arguments).items():
                rounds[side][test].extend(samples)
    differs = False
    print(f"{arguments.model.name}, {arguments.threads} threads, {arguments.rounds} x {arguments.repeats} repeats\n")
    print(
        "| test | medcot, tokens/s | llama-bench | ratio of means | of medians | of the fastest |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for test in rounds["medcot"]:
        own, other = rounds["medcot"][test], rounds["llama-bench"][test]
        ratio = statistics.fmean(own) / statistics.fmean(other)
        medians = statistics.median(own) / statistics.median(other)
        fastest = max(own) / max(other)
        differs |= abs(ratio - 1) > _TOLERANCE
        print(f"| {test} | {_shown(own)} | {_shown(other)} | {ratio:.3f} | {medians:.3f} | {fastest:.3f} |")
    sys.exit(1 if differs else 0)


def _shown(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    main()
