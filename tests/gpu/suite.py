"""The main program of tests/gpu/run.sh: which parts there are, and what is written of them.

The document is written again after every part, so that a suite that is killed leaves what it had.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gpu_watch import GpuWatch
from kept import keep
from machine import commit_of_this_tree, this_machine
from part_list import PARTS
from rich.console import Console
from rich.table import Table
from schedule import Setting, Suite

from bench.gpu_results import SCHEMA_VERSION, GpuResults, PartResult, file_name, measured, outcome
from pipeline.artifacts import package_versions, write_text
from pipeline.errors import MedcotError
from pipeline.hardware import hide_gpu

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_TOTAL_SECONDS = 530.0
_VERSIONS = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo",
    "datasets", "gguf", "llama-cpp-python", "numba", "numpy",
)  # fmt: skip


def print_table(results: GpuResults) -> None:
    table = Table("part", "outcome", "seconds", "measured")
    for part in results.parts:
        table.add_row(part.title, outcome(part), f"{part.seconds:.0f}", "\n".join(measured(part.figures)))
    console = Console(stderr=True, width=140)
    console.print(table)
    console.print(
        f"{results.machine.gpu or 'no GPU: a rehearsal'}, {results.machine.cpu}, {results.seconds:.0f} s in all",
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    machine = this_machine()
    if machine.gpu is None and not options.rehearse:
        raise MedcotError("There is no NVIDIA GPU (nvidia-smi shows none): --rehearse runs the same code on the CPU.")
    if options.rehearse:
        machine = machine.model_copy(
            update={"gpu": None, "gpu_memory_bytes": None, "compute_capability": None, "driver": None}
        )
        hide_gpu()
    os.environ.update(_OFFLINE)  # the parts inherit it
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if (part.name in options.only if options.only else not part.asked)]
    # Each part works in a folder of its own.
    work = (options.work or Path(tempfile.mkdtemp(prefix="medcot-gpu-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    written: list[GpuResults] = []

    def told(parts: list[PartResult]) -> None:
        results = GpuResults(
            schema_version=SCHEMA_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            rehearsal=options.rehearse,
            machine=machine,
            versions={**package_versions(_VERSIONS), "python": platform.python_version()},
            commit=options.commit or commit_of_this_tree(),
            command=shlex.join(["tests/gpu/run.sh", *(arguments if arguments is not None else sys.argv[1:])]),
            seconds=round(time.monotonic() - begun, 1),
            parts=parts,
        )
        write_text(options.out / file_name(machine, options.only or ()), results.model_dump_json(indent=2) + "\n")
        written[:] = [results]
        keep(work, options.out)

    source, built = (path and path.resolve() for path in (options.llama_source, options.llama_built))
    setting = Setting(
        work=work,
        out=options.out.resolve(),
        seconds=options.seconds,
        rehearse=options.rehearse,
        source=source,
        built=built,
        gpu_bytes=machine.gpu_memory_bytes,
    )
    os.environ.setdefault("MEDCOT_CACHE", str(work / "cache"))
    try:
        with GpuWatch(work):
            Suite(chosen, setting, told).run()
    finally:
        keep(work, options.out)
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(written[0].model_dump_json(indent=2), flush=True)
    print_table(written[0])
    return written[0].exit_status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/gpu/run.sh", description="Check and measure what medcot needs of a GPU; see tests/gpu/run.sh."
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="for the JSON")
    parser.add_argument("--work", type=Path, help="empty folder for the models, which is kept (30 GB)")
    parser.add_argument("--seconds", type=float, default=_TOTAL_SECONDS, help="for everything [%(default)s]")
    parser.add_argument("--commit", help="of this tree, where it is no Git checkout")
    parser.add_argument("--llama-source", type=Path, help="llama-cpp-python's source distribution, for a CUDA build")
    parser.add_argument("--llama-built", type=Path, help="folder of the CUDA build: taken as it is, or built there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MedcotError as error:
        sys.exit(f"Error: {error}")
