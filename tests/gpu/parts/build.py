"""The CUDA build of llama.cpp as a call of its own, and cut into pieces that the next call can bring along."""

from __future__ import annotations

import tarfile

from llama_build import Build, built_folder, why_not
from machine import compute_capability
from packages import cut
from part import Recorder, Skipped, perform

from pipeline.errors import MedcotError

_PIECE_BYTES = 15 * 2**20
_PIECES = "llama-cuda"


def measure(recorder: Recorder) -> None:
    request = recorder.request
    reason = why_not(request.source)
    if request.source is None or (reason is not None and not request.rehearse):
        raise Skipped(f"not built: {reason}")
    built = built_folder(request)
    outcome = Build(request.source, built, compute_capability(), alone=True).wait()
    if outcome.reason is not None or outcome.seconds is None:
        raise MedcotError(f"The build failed: {outcome.reason}")
    recorder.figure("CUDA build, by itself", outcome.seconds, "s")
    libraries = sorted(built.rglob("libggml-cuda.so"))
    recorder.check("it has the CUDA library", bool(libraries) or request.rehearse, f"{len(libraries)} found")
    if libraries:
        recorder.figure("libggml-cuda.so", libraries[0].stat().st_size / 1e6, "MB")
    archive = request.work / "llama-cuda.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        tar.add(built, ".")
    pieces = cut(archive, request.out / _PIECES, _PIECE_BYTES)
    recorder.figure("to bring along", archive.stat().st_size / 1e6, "MB")
    recorder.check("cut into pieces", bool(pieces), f"{len(pieces)} in {_PIECES}")


if __name__ == "__main__":
    perform(measure)
