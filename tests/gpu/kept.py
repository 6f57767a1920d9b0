"""What is taken home from a machine that is only lent: all logs in one file, all measurements in one archive."""

from __future__ import annotations

import importlib.metadata
import tarfile
from io import BytesIO
from pathlib import Path

from gpu_watch import NAME as WATCHED

from pipeline.artifacts import write_text
from pipeline.platforms import nvidia_smi

LOGS, ARCHIVE = "log.txt", "measurements.tar.gz"
_LONGEST_LOG = 400_000  # characters, of the end: a compiler's has millions
_MEASUREMENTS = (
    "metrics.jsonl", "result.json", "manifest.json", "plan.json", "evaluation.json", "records-*.jsonl",
    "benchmark.json", "config.yaml", "llama-build.json", WATCHED,
)  # fmt: skip
_LARGEST = 2_000_000  # bytes of one file


def keep(work: Path, out: Path) -> None:
    """Write both files from what is there now; called after each part, so that a suite that is killed leaves them."""
    logs = sorted({*work.rglob("log.txt"), *work.rglob("*.log")})
    texts = [f"==== {log.relative_to(work)}\n{log.read_text(errors='replace')[-_LONGEST_LOG:]}" for log in logs]
    write_text(out / LOGS, "\n".join(texts))
    partial = out / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as archive:
        for name, text in (("pip-freeze.txt", installed()), ("nvidia-smi.txt", driver())):
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, BytesIO(text.encode()))
        for path in sorted({path for pattern in _MEASUREMENTS for path in work.rglob(pattern)}):
            if path.is_file() and path.stat().st_size <= _LARGEST:
                archive.add(path, str(path.relative_to(work)))
    partial.replace(out / ARCHIVE)


def installed() -> str:
    """As pip freeze has it, without pip: every distribution on this Python's path."""
    found = {str(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def driver() -> str:
    return "\n".join(filter(None, [nvidia_smi(), nvidia_smi("-q")])) or "There is no NVIDIA driver here.\n"
