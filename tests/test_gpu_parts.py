"""What the parts of tests/gpu/run.sh are made of, without a GPU: emulated card, watch on the GPU, what is kept."""

import importlib
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_watch import NAME, GpuWatch, memory_used
from kept import ARCHIVE, LOGS, keep
from part_list import PARTS
from random_checkpoint import save_tokenizer
from smaller_card import EIGHT_GB, T4, Card, confine_to, report_as
from synthetic import write_rows
from torch._dynamo.device_interface import CudaInterface

from pipeline import hardware
from pipeline.base_model import load_chat_format
from pipeline.config import load_config
from pipeline.machines import MACHINES
from pipeline.prompts import Example

H200_BYTES = 150_754_820_096


@pytest.mark.parametrize("name", [part.module or f"parts.{part.name}" for part in PARTS])
def test_every_part_finds_what_it_imports(name: str) -> None:
    assert callable(importlib.import_module(name).measure)


@pytest.mark.parametrize(
    ("card", "dtype", "has_flash"), [(T4, "float16", False), (EIGHT_GB, "bfloat16", True)], ids=["T4", "8 GB"]
)
def test_training_on_a_large_card_decides_as_on_the_smaller_one(
    card: Card, dtype: str, has_flash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's answers are an H200's; all that decides by them is real."""
    kernels: dict[str, bool] = {}
    fractions: list[float] = []
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda index: "NVIDIA H200",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=H200_BYTES, major=9, minor=0, multi_processor_count=132
        ),
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "set_per_process_memory_fraction": fractions.append,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for kernel in ("flash", "cudnn"):
        monkeypatch.setattr(
            torch.backends.cuda, f"enable_{kernel}_sdp", lambda on, kernel=kernel: kernels.update({kernel: on})
        )
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    # What torch.compile generates machine code for stays the GPU's that is there.
    monkeypatch.setattr(CudaInterface, "get_compute_capability", CudaInterface.get_compute_capability)
    report_as(card)
    confine_to(card)
    found = hardware.detect(tmp_path)
    assert (found.gpu_memory_bytes, found.gpu_capability) == (card.total_bytes, card.capability)
    assert hardware.compute_dtype("auto", found).value == dtype
    assert torch.cuda.is_bf16_supported() == (dtype == "bfloat16")
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132
    assert CudaInterface.get_compute_capability() == 90
    assert kernels == ({} if has_flash else {"flash": False, "cudnn": False})
    assert fractions == [pytest.approx(card.usable_bytes / H200_BYTES)]


def test_the_emulated_t4_is_the_one_that_runs_are_planned_for() -> None:
    planned = MACHINES["kaggle-t4"]
    assert (T4.total_bytes, T4.capability) == (planned.gpu_memory_bytes, planned.gpu_capability)
    assert T4.usable_bytes < T4.total_bytes


def test_without_a_gpu_an_emulated_card_changes_nothing() -> None:
    before = torch.cuda.get_device_capability
    report_as(T4)
    confine_to(T4)
    assert torch.cuda.get_device_capability is before


def test_the_watch_tells_what_was_taken_of_the_gpu_between_two_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$(cat {tmp_path}/used), 97, 1980, 512.30"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("gpu_watch._SECONDS", 0.05)
    set_used(tmp_path, "500")
    with GpuWatch(tmp_path):
        wait_for_sample(tmp_path, "500")
        begin = time.time()
        set_used(tmp_path, "2548")
        wait_for_sample(tmp_path, "2548")
        end = time.time()
    assert memory_used(tmp_path, begin, end) == 2048 * 2**20
    assert memory_used(tmp_path, end + 100, end + 200) is None
    samples = (tmp_path / NAME).read_text()
    time.sleep(0.2)
    assert (tmp_path / NAME).read_text() == samples  # it ended with the block


def set_used(folder: Path, used: str) -> None:
    (folder / "next").write_text(used)
    (folder / "next").rename(folder / "used")


def wait_for_sample(folder: Path, used: str) -> None:
    until = time.monotonic() + 10
    while f",{used}," not in (folder / NAME).read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_logs_measurements_packages_and_driver_are_taken_home(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "parts" / "t4").mkdir(parents=True)
    out.mkdir()
    (work / "parts" / "t4" / "log.txt").write_text("x" * 500_000 + "the end")
    (work / "llama-build.log").write_text("[100%] built")
    (work / "t4").mkdir()
    (work / "t4" / "metrics.jsonl").write_text('{"step": 1}\n')
    (work / "t4" / "model.safetensors").write_bytes(b"large")
    keep(work, out)
    log = (out / LOGS).read_text()
    assert "==== parts/t4/log.txt\n" in log and "==== llama-build.log\n[100%] built" in log
    assert "the end" in log and len(log) < 410_000
    with tarfile.open(out / ARCHIVE) as archive:
        names = archive.getnames()
        assert names == ["pip-freeze.txt", "nvidia-smi.txt", "t4/metrics.jsonl"]
        freeze = archive.extractfile("pip-freeze.txt")
        assert freeze is not None and f"torch=={torch.__version__}" in freeze.read().decode()
    assert sorted(path.name for path in out.iterdir()) == sorted([ARCHIVE, LOGS])


@pytest.mark.parametrize("preset", ["deepseek-r1-8b", "tinyllama-flashcards"])
def test_rows_have_the_lengths_asked_for_in_the_presets_columns(preset: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 512)
    config = load_config(preset)
    columns = config.data.columns
    lengths = [640, 700, 901]
    rows = write_rows(tmp_path / "rows.jsonl", config, tmp_path, lengths).read_text().splitlines()
    chat_format = load_chat_format(tmp_path, config.prompt.system)
    found = []
    for row in map(json.loads, rows):
        reasoning = row[columns.reasoning] if columns.reasoning else None
        found.append(len(chat_format.encode(Example(row[columns.question], reasoning, row[columns.answer])).input_ids))
    assert found == lengths
