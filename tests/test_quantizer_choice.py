"""A kernel is used where it gives ggml's bytes on this machine; where it does not, ggml works and a note says so."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from export import ggml
from export.quantizers import quantize as interface
from export.quantizers import self_check
from export.quantizers.choice import VARIABLE, Chooser
from export.quantizers.kernel import Importance, Kernel, Packed, Rows
from export.quantizers.self_check import Verdicts, machine_folder
from pipeline.errors import MedcotError

pytest.importorskip("numba")

ROOT = Path(__file__).resolve().parent.parent
ROWS = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
IMPORTANCE = np.linspace(0.1, 3, 512, dtype=np.float32)


@pytest.fixture(autouse=True)
def not_forced_to_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


class RightKernel:
    """A Q4_K kernel whose bytes are ggml's because ggml makes them; ``calls`` counts the rows that it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def plain(self, rows: Rows, packed: Packed) -> None:
        self.calls.append(rows.shape)
        ggml.quantize_rows(rows, None, packed, T.Q4_K)

    def guided(self, rows: Rows, importance: Importance, packed: Packed) -> None:
        self.calls.append(rows.shape)
        ggml.quantize_rows(rows, importance, packed, T.Q4_K)


class WrongKernel(RightKernel):
    """One level of one weight is off by one, in the last block of what it is given."""

    def plain(self, rows: Rows, packed: Packed) -> None:
        super().plain(rows, packed)
        packed[-1, -1] ^= 1


def by_ggml(importance: np.ndarray | None = None) -> np.ndarray:
    packed = np.empty((5, ggml.row_bytes(T.Q4_K, 512)), dtype=np.uint8)
    ggml.quantize_rows(ROWS, importance, packed, T.Q4_K)
    return packed


def chooser_of(kernel: RightKernel, folder: Path, **changed: object) -> Chooser:
    functions = {"plain": kernel.plain, "guided": kernel.guided, **changed}
    return Chooser(lambda: {T.Q4_K: Kernel(**functions)}, lambda: Verdicts(folder))  # type: ignore[arg-type]


def quantized(chooser: Chooser, monkeypatch: pytest.MonkeyPatch, importance: np.ndarray | None = None) -> np.ndarray:
    monkeypatch.setattr(interface, "chooser", lambda: chooser)
    return interface.quantize(ROWS, T.Q4_K, importance)


def test_a_right_kernel_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = RightKernel()
    chooser = chooser_of(kernel, tmp_path)
    assert np.array_equal(quantized(chooser, monkeypatch), by_ggml())
    assert kernel.calls[-1] == ROWS.shape
    assert chooser.notes == []


def test_a_wrong_kernel_is_left_to_ggml_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = WrongKernel()
    chooser = chooser_of(kernel, tmp_path)
    assert np.array_equal(quantized(chooser, monkeypatch), by_ggml())
    assert ROWS.shape not in kernel.calls
    [note] = chooser.notes
    assert note.startswith("Q4_K: the quantizer's bytes are not ggml's on this machine (1 of ")
    assert note.endswith("so ggml's own is used: the same bytes, several times slower.")
    # The other variant is judged by itself.
    assert np.array_equal(quantized(chooser, monkeypatch, IMPORTANCE), by_ggml(IMPORTANCE))
    assert kernel.calls[-1] == ROWS.shape
    assert len(chooser.notes) == 1


def test_the_verdict_is_kept_and_the_note_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = WrongKernel(), WrongKernel()
    noted = chooser_of(first, tmp_path)
    quantized(noted, monkeypatch)
    assert first.calls
    remembering = chooser_of(again, tmp_path)
    quantized(remembering, monkeypatch)
    assert again.calls == [(1, 256)], "loaded, not checked"
    assert remembering.notes == noted.notes


def test_a_damaged_verdict_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(chooser_of(RightKernel(), tmp_path), monkeypatch)
    [kept] = tmp_path.rglob("*.json")
    kept.write_text('{"differ')
    chooser = chooser_of(WrongKernel(), tmp_path)
    quantized(chooser, monkeypatch)
    assert len(chooser.notes) == 1


def test_verdicts_and_code_are_kept_for_one_ggml_and_one_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    here = machine_folder()
    assert machine_folder() == here
    assert here.is_relative_to(tmp_path)
    other = tmp_path / "libggml-base.so"
    other.write_bytes(b"another build")
    with monkeypatch.context() as patch:
        patch.setattr(ggml, "library_path", lambda: other)
        assert machine_folder() != here
    with monkeypatch.context() as patch:
        (tmp_path / "lanes.py").write_text("another kernel")
        patch.setattr(self_check, "__file__", str(tmp_path / "self_check.py"))
        assert machine_folder() != here


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    chooser = chooser_of(RightKernel(), tmp_path)
    assert np.array_equal(quantized(chooser, monkeypatch), by_ggml())
    assert chooser.notes == []


def test_a_cache_that_is_a_file_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    chooser = chooser_of(RightKernel(), tmp_path / "cache")
    assert np.array_equal(quantized(chooser, monkeypatch), by_ggml())
    assert chooser.notes == []


def test_a_kernel_that_cannot_be_compiled_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(rows: Rows, packed: Packed) -> None:
        raise NotImplementedError("no such instruction\nand a long dump")

    chooser = chooser_of(RightKernel(), tmp_path, plain=failing)
    assert np.array_equal(quantized(chooser, monkeypatch), by_ggml())
    assert chooser.notes == [
        "Q4_K: the quantizer cannot be compiled (NotImplementedError: no such instruction), "
        "so ggml's own is used: the same bytes, several times slower."
    ]


def test_without_numba_ggml_works_and_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without() -> Mapping[T, Kernel]:
        raise ImportError("Numba needs NumPy 2.3 or less")

    chooser = Chooser(without, lambda: Verdicts(tmp_path))
    for _ in range(2):
        assert np.array_equal(quantized(chooser, monkeypatch, IMPORTANCE), by_ggml(IMPORTANCE))
    assert chooser.notes == [
        "numba cannot be used (ImportError: Numba needs NumPy 2.3 or less), "
        "so ggml's own is used: the same bytes, several times slower."
    ]


def test_a_missing_variant_is_ggmls_without_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = chooser_of(RightKernel(), tmp_path, guided=None)
    assert np.array_equal(quantized(chooser, monkeypatch, IMPORTANCE), by_ggml(IMPORTANCE))
    assert chooser.notes == []


def test_the_environment_forces_ggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = RightKernel()
    monkeypatch.setenv(VARIABLE, "ggml")
    quantized(chooser_of(kernel, tmp_path), monkeypatch)
    assert kernel.calls == []
    monkeypatch.setenv(VARIABLE, "gglm")
    with pytest.raises(MedcotError, match=f"{VARIABLE} is 'gglm': set it to ggml, or not at all"):
        quantized(chooser_of(kernel, tmp_path), monkeypatch)


def test_compiling_is_announced_once(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = [(T.Q4_K, False), (T.Q4_K, True), (T.Q8_0, True)]
    chooser_of(RightKernel(), tmp_path).prepare(wanted, said.append)
    assert said == ["Compiling the quantizers for this CPU, once: some seconds."]
    chooser_of(RightKernel(), tmp_path).prepare(wanted, said.append)
    assert len(said) == 1


def test_types_that_ignore_importance_need_no_second_kernel(tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []

    def plain(rows: Rows, packed: Packed) -> None:
        calls.append(rows.shape)
        ggml.quantize_rows(rows, None, packed, T.Q8_0)

    chooser = Chooser(lambda: {T.Q8_0: Kernel(plain)}, lambda: Verdicts(tmp_path))
    said: list[str] = []
    chooser.prepare([(T.Q8_0, True)], said.append)
    assert len(said) == 1
    checked = len(calls)
    chooser.function(T.Q8_0, True)(ROWS, IMPORTANCE, np.empty((5, ggml.row_bytes(T.Q8_0, 512)), dtype=np.uint8))
    assert calls[checked:] == [ROWS.shape]


SECONDS = """
import sys, time
import numpy as np
from gguf import GGMLQuantizationType as T
from export.quantizers.choice import chooser
from export.quantizers.quantize import quantize

started, said = time.perf_counter(), []
chooser().prepare([(T.Q8_0, False)], said.append)
quantize(np.ones((1, 256), dtype=np.float32), T.Q8_0)
print(len(said), "numba" in sys.modules, round(time.perf_counter() - started, 3), chooser().notes)
"""


@pytest.mark.broad
def test_a_second_process(tmp_path: Path) -> None:
    """Compiled kernels lie in the cache folder; the second process neither compiles nor checks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEDCOT_CACHE": str(tmp_path / "medcot")}
    outputs = [
        subprocess.run([sys.executable, "-c", SECONDS], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (output.stdout.split(maxsplit=3) for output in outputs)
    assert first[0] == "1" and first[3].strip() == "[]"
    assert second[0] == "0" and second[3].strip() == "[]"
    assert float(second[2]) < float(first[2]) / 2
