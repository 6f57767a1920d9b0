"""Peak memory and speed of the prepare stage at 1,000 and at 1,000,000 synthetic records.

    python tests/perf/prepare_memory.py [ROWS...]

Every size is prepared in a fresh process with the default preset's tokenizer; the table goes to standard output.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (1_000, 1_000_000)
_WORDS = 5000

_PREPARE = """
import sys, time
from pathlib import Path
from pipeline.config import load_config
from pipeline.memory import peak_memory_bytes
from pipeline.prepare import prepare
config = load_config(None, [f"data.source={sys.argv[1]}"])
started = time.monotonic()
result = prepare(config, {}, Path(sys.argv[2]))
print(result.read, result.train_rows, result.rejected, peak_memory_bytes(), time.monotonic() - started)
"""


def write_records(path: Path, rows: int) -> None:
    """Records of about 60 words drawn at random, so that none resembles another."""
    draw = random.Random(rows)
    words = [f"w{number:x}" for number in range(_WORDS)]
    with path.open("w") as stream:
        for number in range(rows):
            text = draw.choices(words, k=60)
            question, reasoning, answer = " ".join(text[:20]), " ".join(text[20:45]), " ".join(text[45:])
            row = {"Question": f"{number} {question}?", "Complex_CoT": f"{reasoning}.", "Response": f"{answer}."}
            stream.write(json.dumps(row) + "\n")


def main(sizes: list[int]) -> None:
    print("| records | for training | rejected | peak MiB | seconds | records/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "records.jsonl"
            write_records(source, rows)
            command = [sys.executable, "-c", _PREPARE, str(source), str(Path(folder) / "out")]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            read, trained, rejected, peak, seconds = output.split()
            assert int(read) == rows
            speed = rows / float(seconds)
            print(
                f"| {rows:,} | {trained} | {rejected} | {int(peak) / 2**20:.0f} | {float(seconds):.0f} | {speed:,.0f} |"
            )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(SIZES))
