"""What the chat costs beside llama-cpp-python alone: tokens a second, and the time from start to prompt.

    python tests/perf/chat_overhead.py FILE.gguf [--tokens 56] [--rounds 60] [--threads N]

Generation: one model, one prompt; in every round each way generates as many tokens once, in turns, the order reversed
from round to round. Raw is ``Llama.generate`` with nothing done to its tokens; session is ``Session.ask``; terminal
also shows what it yields, to a terminal of 80 x 24 that nobody looks at. Every way has read the prompt before, so that
what is timed is from the first token to the last. The ratio is the median over rounds (with their quartiles), and must
be 0.97 at least.

Start: the chat's process to its prompt in a pseudo terminal, beside a process that imports llama_cpp and loads the
file, in turns; the difference of the medians must be 0.5 s at most. The file has been proven and read before, so both
find it in memory. Prints two tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from chat.display import StreamingDisplay, Streams
from chat.session import Sampling, Session
from export.gguf_model import GgufModel
from pipeline.hardware import usable_cores

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Explain in detail how the heart works, what can go wrong with it, and how that is treated."
LEAST_RATIO, MOST_START_SECONDS = 0.97, 0.5
LOAD = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=4096, verbose=False); print('> ', flush=True)"


def generation(path: Path, tokens: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens a second of each way, a value a round."""
    with GgufModel(path, n_ctx=4096, n_threads=threads) as model:
        prompt = model.chat_format.question_ids(QUESTION)
        ends_turn = model.is_end_of_generation
        # Looked at as ever, but not obeyed: what ends a turn would end a round, too short to time.
        model.is_end_of_generation = lambda token: ends_turn(token) and False  # type: ignore[method-assign]
        session = Session(model, Sampling(temperature=0.6, top_p=0.95, seed=1), max_new_tokens=tokens)
        ways: dict[str, Callable[[], float]] = {
            "raw": lambda: _pace(_raw(model, prompt, tokens), tokens),
            "session": lambda: _asked(session, None),
            "terminal": lambda: _asked(session, _display()),
        }
        for way in ways.values():
            way()
        paces: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 == 0 else reversed(ways):
                paces[name].append(ways[name]())
        return paces


def _raw(model: GgufModel, prompt: list[int], tokens: int) -> Iterator[int]:
    model._llama.set_seed(1)
    stream = model._llama.generate(prompt, top_k=0, top_p=0.95, min_p=0.0, temp=0.6, repeat_penalty=1.0)
    for _ in range(tokens):
        yield next(stream)


def _pace(ids: Iterator[int], tokens: int) -> float:
    next(ids)
    started = time.perf_counter()
    for _ in ids:
        pass
    return (tokens - 1) / (time.perf_counter() - started)


def _display() -> StreamingDisplay:
    ours, theirs = pty.openpty()
    console = Console(file=os.fdopen(theirs, "w"), force_terminal=True, width=80, height=24)
    # Somebody has to read, or the terminal's buffer fills up and the chat waits.
    subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(ours)
    return StreamingDisplay(Streams(console, console), folded=False)


def _asked(session: Session, display: StreamingDisplay | None) -> float:
    session.clear()
    for event in session.ask(QUESTION):
        if display is not None:
            display.show(event)
    turn = session.history[-1]
    if turn.finished != "length" or turn.tokens_per_second is None:
        sys.exit(f"The answer ended after {turn.tokens} tokens ({turn.finished}): nothing to compare.")
    return turn.tokens_per_second


def start_seconds(path: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of each process to its prompt."""
    ways = {
        "llama_cpp": [sys.executable, "-c", LOAD, str(path)],
        "medcot chat": [sys.executable, "-m", "pipeline.cli", "chat", str(path)],
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "XDG_STATE_HOME": folder, "TERM": "xterm"}
        for command in ways.values():
            _until_prompt(command, environment)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 == 0 else reversed(ways):
                seconds[name].append(_until_prompt(ways[name], environment))
    return seconds


def _until_prompt(command: list[str], environment: dict[str, str]) -> float:
    ours, theirs = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the process has ended
            sys.exit(f"{' '.join(command)} ended without a prompt: {shown.decode(errors='replace')}")
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    os.close(ours)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=56, help="Longer answers of a small model end in a loop.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=usable_cores())
    asked = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as medcot chat has it
    starts = start_seconds(asked.gguf, asked.rounds)
    paces = generation(asked.gguf, asked.tokens, asked.rounds, asked.threads)
    quartiles = {
        name: statistics.quantiles((way / raw for way, raw in zip(values, paces["raw"], strict=True)), n=4)
        for name, values in paces.items()
    }
    start = statistics.median(starts["medcot chat"]) - statistics.median(starts["llama_cpp"])
    print(f"{'generation':12}{'tokens/s':>10}{'of raw':>9}")
    for name, values in paces.items():
        low, ratio, high = quartiles[name]
        print(f"{name:12}{statistics.median(values):10.1f}{ratio:9.3f} ({low:.3f} to {high:.3f})")
    print(f"\n{'start':12}{'seconds':>10}")
    for name, values in starts.items():
        print(f"{name:12}{statistics.median(values):10.3f}")
    print(f"{'difference':12}{start:10.3f}\n")
    passed = min(ratio for _, ratio, _ in quartiles.values()) >= LEAST_RATIO and start <= MOST_START_SECONDS
    print(json.dumps({"tokens_per_second": paces, "quartiles": quartiles, "start_seconds": starts, "passed": passed}))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
