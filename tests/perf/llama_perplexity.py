"""Our divergence of a quantized file beside llama.cpp's llama-perplexity --kl-divergence, on the same tokens.

    python tests/perf/llama_perplexity.py F16.gguf Q4_K_M.gguf TEXT --llama-perplexity BINARY [--chunks 4]

llama-perplexity cuts the text into chunks of 512 tokens and compares the predictions of the second half of each; it
keeps the reference's logits in 16 bit. Exit status 1 where a figure differs by more than TOLERANCE.
tests/perf/llama_bench.py says how to build it.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.divergence import REFERENCE, Divergence, compare
from export.gguf_model import GgufModel
from pipeline.hardware import usable_cores

CONTEXT = 512
TOLERANCE = 0.01  # of each figure; 16-bit logits alone change the smallest divergences by some thousandths
_NUMBER = r"\s*:?\s*([\d.]+)"
_PATTERNS = {
    "perplexity of the reference": rf"Mean PPL\(base\){_NUMBER}",
    "perplexity": rf"Mean PPL\(Q\){_NUMBER}",
    "mean KL": rf"Mean\s+KLD{_NUMBER}",
    "p99 KL": rf"99\.0%\s+KLD{_NUMBER}",
    "same likeliest token": r"Same top p\s*:\s*([\d.]+)",
}


def theirs(binary: Path, reference: Path, model: Path, text: Path, chunks: int, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.kld"
        common = ["-f", text, "-c", CONTEXT, "-b", CONTEXT, "--chunks", chunks, "-t", threads, "-ngl", 0, "-fa", "off"]
        _run([binary, "-m", reference, "--kl-divergence-base", logits, *common])
        output = _run([binary, "-m", model, "--kl-divergence-base", logits, "--kl-divergence", *common])
    figures = {}
    for name, pattern in _PATTERNS.items():
        found = re.search(pattern, output)
        if found is None:
            raise SystemExit(f"llama-perplexity printed no {name}: {output[-500:]}")
        figures[name] = float(found[1])
    figures["same likeliest token"] /= 100
    return figures


def ours(reference: Path, model: Path, text: Path, chunks: int, threads: int) -> dict[str, float]:
    with (
        GgufModel(reference, n_ctx=CONTEXT, n_threads=threads) as exact,
        GgufModel(model, n_ctx=CONTEXT, n_threads=threads) as other,
    ):
        ids = exact.tokenize_like_llama_cpp(text.read_text(encoding="utf-8"))
        cut = [ids[start : start + CONTEXT] for start in range(0, chunks * CONTEXT, CONTEXT)]
        found = [compare(exact, {"other": other}, chunk, CONTEXT // 2 + 1) for chunk in cut]
    base, quantized = (Divergence.joined([each[name] for each in found]) for name in (REFERENCE, "other"))
    ordered = sorted(quantized.kl)
    position = 0.99 * (len(ordered) - 1)
    low = int(position)
    return {
        "perplexity of the reference": math.exp(base.nll.mean()),
        "perplexity": math.exp(quantized.nll.mean()),
        "mean KL": float(quantized.kl.mean()),
        "p99 KL": ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]),
        "same likeliest token": float(quantized.same_top.mean()),
    }


def _run(command: list[object]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama-perplexity", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=usable_cores())
    given = parser.parse_args()
    expected = theirs(given.llama_perplexity, given.reference, given.model, given.text, given.chunks, given.threads)
    found = ours(given.reference, given.model, given.text, given.chunks, given.threads)
    print("| figure | medcot | llama-perplexity |\n| --- | ---: | ---: |")
    for name, value in found.items():
        print(f"| {name} | {value:.6f} | {expected[name]:.6f} |")
    sys.exit(1 if any(abs(value / expected[name] - 1) > TOLERANCE for name, value in found.items()) else 0)


if __name__ == "__main__":
    main()
