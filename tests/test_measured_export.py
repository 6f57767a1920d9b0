"""Export with an importance matrix: the file libllama would make, measured on the way or given."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_importance import _QUANTIZE
from tiny_models import read_metadata, read_tensors, save_model, tensor_bytes

from export import measured_export
from export.export import export_models
from export.importance_file import ImportanceMatrix, read_importance
from export.measured_export import MeasuringText, export_with_imatrix, measuring_text
from export.quant_types import FILE_TYPES
from pipeline.adapter_recipe import AdapterRecipe, write_recipe
from pipeline.errors import MedcotError
from pipeline.results import ExportedModels

pytestmark = pytest.mark.broad


WITH_MATRIX = ["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Eight layers: the first eighth of them has types of its own.
    return save_model(tmp_path_factory.mktemp("base") / "base", hidden=256, feed_forward=256, layers=8)


def exporter(base: Path) -> measured_export.Exporter:
    def write(
        out_dir: Path, quantizations: list[str], base_quantization: str | None, importance: ImportanceMatrix | None
    ) -> ExportedModels:
        return export_models(base, None, out_dir, "m", quantizations, base_quantization, importance=importance)

    return write


def text() -> MeasuringText:
    random = np.random.default_rng(0)
    return MeasuringText([random.integers(0, 250, 60).tolist()], "random")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    export_with_imatrix("auto", exporter(base), out, "m", ["F32", *WITH_MATRIX], "Q4_K_M", text, lambda: "m")
    return out


def test_every_file_is_libllamas(exported: Path, tmp_path: Path) -> None:
    jobs = {str(tmp_path / f"{name}.gguf"): int(FILE_TYPES[name].number) for name in WITH_MATRIX}
    command = [sys.executable, "-c", _QUANTIZE, exported / "m-F32.gguf", exported / "m.imatrix.gguf", json.dumps(jobs)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for name in WITH_MATRIX:
        ours, reference = read_tensors(exported / f"m-{name}.gguf"), read_tensors(tmp_path / f"{name}.gguf")
        assert set(ours) == set(reference)
        for key, tensor in ours.items():
            assert tensor.tensor_type is reference[key].tensor_type, (name, key)
            assert np.array_equal(tensor_bytes(tensor), tensor_bytes(reference[key])), (name, key)


def test_what_auto_leaves_behind(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    files = {f"m-{name}.gguf" for name in ["F32", *WITH_MATRIX]}
    assert names == {"Modelfile", "m.imatrix.gguf", "m-base-Q4_K_M.gguf"} | files
    metadata = read_metadata(exported / "m-Q4_K_M.gguf")
    assert metadata["quantize.imatrix.file"] == "m.imatrix.gguf"
    assert metadata["quantize.imatrix.dataset"] == "random"
    assert not any(key.startswith("quantize.imatrix") for key in read_metadata(exported / "m-F32.gguf"))
    # Without an adapter the base is the tuned model, and both are made alike.
    tuned, plain = read_tensors(exported / "m-Q4_K_M.gguf"), read_tensors(exported / "m-base-Q4_K_M.gguf")
    assert all(np.array_equal(tensor_bytes(tuned[key]), tensor_bytes(plain[key])) for key in tuned)


def test_a_file_gives_the_same_bytes_and_none_gives_others(base: Path, exported: Path, tmp_path: Path) -> None:
    write = partial(export_with_imatrix, export=exporter(base), name="m", quantizations=["Q4_K_M"],
                    base_quantization=None, text=text, model=lambda: "m")  # fmt: skip
    write(str(exported / "m.imatrix.gguf"), out_dir=tmp_path / "file")
    assert (tmp_path / "file/m-Q4_K_M.gguf").read_bytes() == (exported / "m-Q4_K_M.gguf").read_bytes()
    write("none", out_dir=tmp_path / "none")
    without, with_it = read_tensors(tmp_path / "none/m-Q4_K_M.gguf"), read_tensors(exported / "m-Q4_K_M.gguf")
    changed = {
        key for key, each in without.items() if not np.array_equal(tensor_bytes(each), tensor_bytes(with_it[key]))
    }
    assert changed == set(read_importance(exported / "m.imatrix.gguf").matrices)
    with pytest.raises(MedcotError, match="does not exist: --imatrix takes auto, none"):
        write(str(tmp_path / "absent.gguf"), out_dir=tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_another_models_matrix_is_refused_before_anything_is_written(exported: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", hidden=256, feed_forward=320, layers=8)
    with pytest.raises(MedcotError, match=r"measured on another model: blk\.0\.ffn_down\.weight has 256 columns"):
        export_models(
            other, None, tmp_path / "out", "m", ["Q4_K_M"], importance=read_importance(exported / "m.imatrix.gguf")
        )
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_for_types_without_a_use_for_it(base: Path, tmp_path: Path) -> None:
    def unused() -> MeasuringText:
        raise AssertionError("asked for text")

    export_with_imatrix("auto", exporter(base), tmp_path, "m", ["F16", "Q8_0"], None, unused, lambda: "m")
    assert not list(tmp_path.glob("*imatrix*"))


def test_a_failed_measurement_leaves_nothing(base: Path, tmp_path: Path) -> None:
    broken = lambda: MeasuringText([[10**6]], "broken")  # noqa: E731
    with pytest.raises(MedcotError, match="cannot be measured"):
        export_with_imatrix("auto", exporter(base), tmp_path / "out", "m", ["Q4_K_M"], None, broken, lambda: "m")
    assert not list((tmp_path / "out").iterdir())


def test_what_was_measured_is_measured_once(base: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "m.imatrix.gguf", tmp_path)
    before = (tmp_path / "m.imatrix.gguf").stat()
    said: list[str] = []
    write = partial(export_with_imatrix, "auto", exporter(base), tmp_path, "m", ["Q4_K_M"], None, text,
                    announce=said.append)  # fmt: skip
    write(lambda: "m")
    assert (tmp_path / "m.imatrix.gguf").stat().st_ino == before.st_ino and "taken as it is" in said[0]
    assert (tmp_path / "m-Q4_K_M.gguf").read_bytes() == (exported / "m-Q4_K_M.gguf").read_bytes()
    write(lambda: "another model")
    assert (tmp_path / "m.imatrix.gguf").stat().st_ino != before.st_ino and len(said) == 1
    # One that is cut short is of no use.
    os.truncate(tmp_path / "m.imatrix.gguf", 100)
    write(lambda: "another model")
    assert read_importance(tmp_path / "m.imatrix.gguf").measured_from and len(said) == 1


def test_two_exports_do_not_measure_in_one_folder(base: Path, tmp_path: Path) -> None:
    with (
        measured_export._scratch(tmp_path / ".imatrix") as scratch,
        pytest.raises(MedcotError, match="Another export is measuring in"),
    ):
        (scratch / "half").write_text("still needed")
        try:
            export_with_imatrix("auto", exporter(base), tmp_path, "m", ["Q4_K_M"], None, text, lambda: "m")
        finally:
            assert (scratch / "half").exists()
    assert not (tmp_path / ".imatrix").exists()


def test_text_comes_from_records_or_the_packaged_cases(base: Path, tmp_path: Path) -> None:
    packaged = measuring_text(base, None)
    assert packaged.dataset == "medcot's packaged cases" and len(packaged.sequences) > 2
    records = tmp_path / "train.jsonl"
    records.write_text('{"question": "Why?", "reasoning": "Hm.", "answer": "So."}\n')
    given = measuring_text(base, records)
    assert given.dataset == "train.jsonl" and len(given.sequences) == 1
    # medcot export --adapter measures on the prompts that medcot run measures on.
    adapter = tmp_path / "adapter"
    shutil.copytree(base, adapter)
    write_recipe(adapter, AdapterRecipe(base="b", template_sha256="0" * 64, system="Be careful."))
    with_system = measuring_text(base, records, "Be careful.")
    assert measuring_text(adapter, records) == with_system != given
