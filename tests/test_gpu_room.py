"""Whether the benchmark's files fit a GPU together; sizes are those of 8B files."""

import os
from pathlib import Path

import pytest

from pipeline.gpu_room import bytes_together, fit_together, gpu_memory_here
from pipeline.hardware import GIBIBYTE

Q8_0, Q4_K_M = 8.54e9, 4.92e9


@pytest.mark.parametrize(
    ("files", "gibibytes", "fits"),
    [([Q8_0], 14.6, True), ([Q8_0, Q4_K_M], 14.6, False), ([Q8_0, Q4_K_M], 24, True), ([Q4_K_M], 0, False)],
)
def test_two_8b_files_do_not_fit_a_t4(files: list[float], gibibytes: float, fits: bool) -> None:
    assert fit_together(files, gibibytes * GIBIBYTE) is fits
    assert bytes_together(files) > sum(files)


@pytest.mark.parametrize(("told", "expected"), [("15360\n15360", 15360 * 1024**2), ("", 0), ("[N/A]", 0)])
def test_the_drivers_tool_tells_the_memory(
    told: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_memory_here() == expected
