"""Peak memory and speed of every reader over 1,000 and 1,000,000 records.

    python tests/perf/reader_memory.py [--rows 1000 --rows 1000000]

Writes one synthetic file at a time into a temporary folder (some 200 MB at the most), reads it in a process of its
own, and prints a table, then one line of JSON. Resident memory is the operating system's high-water mark, which
includes the interpreter and, for Parquet, pyarrow; seconds are of the reading alone, without imports.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATCH = 10_000
# Prints "rows bytes seconds": read by measure() below.
CHILD = """
import sys, time
from pipeline.config import DataConfig
from pipeline.memory import peak_memory_bytes
from pipeline.sources import read_rows
begin = time.perf_counter()
rows = sum(row.fault is None for row in read_rows(DataConfig.model_validate({"source": sys.argv[1]})))
print(rows, peak_memory_bytes(), time.perf_counter() - begin)
"""


def records(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        yield {
            "Question": f"A patient of {number % 90} years has sign {number}: what is it?",
            "Complex_CoT": f"Okay, sign {number}.\nIt comes with fever, and with pain in the {number % 7}th rib.",
            "Response": f"Finding {number}.",
        }


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records(count))


def write_jsonl_gz(path: Path, count: int) -> None:
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records(count))


def write_json(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records(count)):
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")


def write_csv(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["Question", "Complex_CoT", "Response"])
        writer.writeheader()
        writer.writerows(records(count))


def write_parquet(path: Path, count: int) -> None:
    """One row group, as pyarrow writes up to 1,048,576 rows by default: the case that takes most memory to read."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = records(count)
    batches = [pa.RecordBatch.from_pylist(batch) for batch in iter(lambda: list(itertools.islice(rows, BATCH)), [])]
    write_table(pa.Table.from_batches(batches), path)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_jsonl_gz,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def measure(name: str, rows: int) -> dict[str, str | int | float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{name}"
        WRITERS[name](path, rows)
        size = path.stat().st_size
        result = subprocess.run(
            [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
    read, peak, seconds = result.stdout.split()
    if int(read) != rows:
        raise SystemExit(f"{name}: {read} of {rows} records came out")
    return {"format": name, "rows": rows, "file_bytes": size, "peak_rss_bytes": int(peak), "seconds": float(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="records in a file; may be repeated")
    counts = parser.parse_args().rows or [1_000, 1_000_000]
    measured = []
    print(f"{'format':<9} {'rows':>9} {'file MB':>8} {'peak MiB':>9} {'seconds':>8} {'rows/s':>9}")
    for name in WRITERS:
        for rows in counts:
            figures = measure(name, rows)
            measured.append(figures)
            seconds = float(figures["seconds"])
            print(
                f"{name:<9} {rows:>9,} {figures['file_bytes'] / 1e6:>8.1f} {figures['peak_rss_bytes'] / 2**20:>9.1f} "
                f"{seconds:>8.2f} {rows / seconds:>9,.0f}",
                flush=True,
            )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
