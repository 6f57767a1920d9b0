"""The CUDA build of llama.cpp as a call of its own; its wheel is cut into pieces that the next call can bring along."""

from __future__ import annotations

import zipfile

from cuda_llama import CudaBuild, built_folder, recipe_for
from machine import ROOT
from packages import cut
from part import Recorder, Skipped, perform

from pipeline.errors import MedcotError
from pipeline.llama_build import LIBRARY, cpu_recipe

_PIECE_BYTES = 15 * 2**20
_PIECES = "llama-cuda"


def measure(recorder: Recorder) -> None:
    request = recorder.request
    if built_folder(request).exists():
        raise MedcotError(f"{built_folder(request)} is there already: remove it or name another folder.")
    if request.rehearse and request.source is not None:
        recipe = cpu_recipe(ROOT / "requirements-gpu.txt")
    else:
        try:
            recipe = recipe_for(request.source)
        except MedcotError as error:
            raise Skipped(f"not built: {error}") from error
    wheel, seconds = CudaBuild(request, recipe, alone=True).wait()
    recorder.figure("build, by itself", seconds, "s")
    recorder.figure("wheel", wheel.stat().st_size / 1e6, "MB")
    if not request.rehearse:
        sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
        recorder.check("it has the CUDA library", LIBRARY in sizes, LIBRARY)
        recorder.figure("libggml-cuda.so", sizes.get(LIBRARY, 0) / 1e6, "MB")
    recorder.check("it is there for the next call", any(built_folder(request).iterdir()), str(built_folder(request)))
    pieces = cut(wheel, request.out / _PIECES, _PIECE_BYTES)
    recorder.check("its wheel is cut into pieces", bool(pieces), f"{len(pieces)} in {_PIECES}")


if __name__ == "__main__":
    perform(measure)
