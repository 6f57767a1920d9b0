"""Merging, reading and writing: what export_models makes of tiny random models, and what it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gguf import TokenType
from safetensors.torch import load_file, save_file
from tiny_models import CHATML, SHARED, read_metadata, read_tensors, save_adapter, save_model, tensor_bytes

from export import export as export_module
from export import stream
from export.export import export_models
from export.merged_weights import WeightedAdapter
from export.tokenizer_metadata import read_vocabulary
from pipeline.cli import cli
from pipeline.errors import MedcotError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("model") / "adapter", base)


def test_what_trained_is_in_the_metadata(base: Path, tmp_path: Path) -> None:
    export_models(base, None, tmp_path, "m", ["F16"], "F16", system="Answer as a physician.")
    for name in ("m-F16.gguf", "m-base-F16.gguf"):
        metadata = read_metadata(tmp_path / name)
        assert metadata["medcot.chat_template.sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
        assert metadata["medcot.system_prompt"] == "Answer as a physician."
    export_models(base, None, tmp_path, "m", ["F16"])
    assert "medcot.system_prompt" not in read_metadata(tmp_path / "m-F16.gguf")


def medcot(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_the_command_writes_all_that_it_is_asked_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = save_adapter(tmp_path / "second", base, seed=2, target_modules=["q_proj"])
    done = medcot(
        "--base", base, "--adapter", f"{adapter}=0.5", "--adapter", second, "--adapter-gguf", "--out", tmp_path / "out",
        "--quant", "F16", "--quant", "q8_0", "--base-quant", "Q4_0", "--name", "mixed", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [(file["name"], file["role"]) for file in result["files"]] == [
        ("mixed-F16.gguf", "tuned"), ("mixed-Q8_0.gguf", "tuned"), ("mixed-base-Q4_0.gguf", "base"),
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "Modelfile", "mixed-adapter.gguf", *(file["name"] for file in result["files"]),
    }  # fmt: skip
    several = [WeightedAdapter(adapter, 0.5), WeightedAdapter(second)]
    export_models(base, several, tmp_path / "direct", "mixed", ["F16"])
    assert (tmp_path / "direct/mixed-F16.gguf").read_bytes() == (tmp_path / "out/mixed-F16.gguf").read_bytes()


def test_the_command_warns_of_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = copy_of(base, tmp_path / "another-model")
    done = medcot("--base", other, "--adapter", adapter, "--out", tmp_path / "out", "--quant", "F16")
    assert done.exit_code == 0
    assert done.stderr.startswith("Warning: ") and "worthless" in done.stderr
    assert done.stdout.count("\n") == 1 and "model-F16.gguf" in done.stdout


def test_usage_errors(base: Path, tmp_path: Path) -> None:
    assert medcot("--base", base, "--out", tmp_path / "out", "--adapter-gguf").exit_code == 2
    failed = medcot("--base", base, "--out", tmp_path / "out", "--adapter", f"{base}=half")
    assert isinstance(failed.exception, MedcotError) and "write DIR=WEIGHT" in str(failed.exception)


def test_shards_and_one_file_give_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    sharded = save_model(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, folder in (("one", base), ("many", sharded)):
        export_models(folder, adapter, tmp_path / name, "m", ["Q4_K_M"])
    assert (tmp_path / "one/m-Q4_K_M.gguf").read_bytes() == (tmp_path / "many/m-Q4_K_M.gguf").read_bytes()


def test_small_blocks_of_rows_give_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_models(base, adapter, tmp_path / "whole", "m", ["F16", "Q8_0"])
    monkeypatch.setattr(stream, "_BLOCK_WEIGHTS", 700)
    export_models(base, adapter, tmp_path / "blocks", "m", ["F16", "Q8_0"])
    for name in ("m-F16.gguf", "m-Q8_0.gguf"):
        whole, blocks = read_tensors(tmp_path / "whole" / name), read_tensors(tmp_path / "blocks" / name)
        for key, tensor in whole.items():
            same = tensor_bytes(tensor) == tensor_bytes(blocks[key])
            # BLAS may sum a small product in another order, so a value may round to its other neighbour.
            assert same.mean() > 0.999, (name, key)


def test_any_number_of_threads_gives_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_BLOCK_WEIGHTS", 700)
    for threads in (1, 2, 5):
        monkeypatch.setattr(stream, "usable_cores", lambda threads=threads: threads)
        export_models(base, adapter, tmp_path / str(threads), "m", ["F32", "Q4_K_M"], "Q8_0")
    one, *others = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2", "5")]
    assert len(one) == 4 and others == [one, one]


def test_metadata_of_a_byte_level_vocabulary(base: Path, tmp_path: Path) -> None:
    export_models(base, None, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    kinds = dict(zip(tokens, types, strict=True))
    assert kinds["<|im_end|>"] == TokenType.CONTROL
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert [kinds[f"[PAD{len(tokens) - n}]"] for n in (1, 5)] == [TokenType.UNUSED] * 2
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"  # type: ignore[call-overload]
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in (tmp_path / "Modelfile").read_text()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
def test_real_tokenizers_are_recognised() -> None:
    r1 = read_vocabulary(SHARED / "tokenizers/deepseek-r1-distill-llama-8b", 128256)
    assert (r1.model, r1.pre, r1.add_bos, r1.add_eos) == ("gpt2", "llama-bpe", True, False)
    assert r1.special_ids == {"bos": 128000, "eos": 128001, "pad": 128001}
    assert r1.types[128011:128015] == [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED] * 2
    tiny = read_vocabulary(SHARED / "tokenizers/tinyllama-1.1b-chat", 32000)
    assert (tiny.model, tiny.pre, tiny.add_bos, tiny.add_space_prefix) == ("llama", "default", True, True)
    assert tiny.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert tiny.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}


def copy_of(base: Path, folder: Path, **config: object) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config:
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def change_weights(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def remove_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.down_proj.weight"]


def add_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


def to_bytes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(161, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "up_proj.weight holds NaN"),
        (remove_tensor, "no tensor model.layers.2.mlp.down_proj.weight"),
        (add_tensor, "no place for, such as model.layers.0.self_attn.q_proj.bias"),
        (to_bytes, "model.norm.weight is stored as I8"),
        (grow, r"shape \[161, 64\], config.json says \[160, 64\]"),
    ],
)
def test_bad_weights_are_one_sentence(base: Path, tmp_path: Path, change: object, message: str) -> None:
    broken = copy_of(base, tmp_path / "broken")
    change_weights(broken, change)
    with pytest.raises(MedcotError, match=message):
        export_models(broken, None, tmp_path / "out", "m", ["F16"])
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


def test_truncated_and_missing_files(base: Path, tmp_path: Path) -> None:
    broken = copy_of(base, tmp_path / "broken")
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    for length, message in (
        (len(whole) - 100, "is truncated: it has"),
        (100, "is truncated or"),
        (3, "truncated or"),
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(MedcotError, match=message):
            export_models(broken, None, tmp_path / "out", "m", ["F16"])
    path.unlink()
    with pytest.raises(MedcotError, match=r"lacks model.safetensors \(found"):
        export_models(broken, None, tmp_path / "out", "m", ["F16"])
    sharded = save_model(tmp_path / "sharded", max_shard_size="100KB")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(MedcotError, match="lacks model-00002-of"):
        export_models(sharded, None, tmp_path / "out", "m", ["F16"])


def test_a_failure_in_the_middle_leaves_what_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "m-F16.gguf").write_bytes(b"earlier")
    quantize, calls = stream.quantize, 0

    def full_disk(rows: np.ndarray, ggml_type: object, importance: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(28, "No space left on device")
        return quantize(rows, ggml_type, importance)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "quantize", full_disk)
    with pytest.raises(MedcotError, match="the disk is full"):
        export_models(base, None, out, "m", ["F16", "Q8_0"])
    assert {path.name: path.read_bytes() for path in out.glob("[!.]*")} == {"m-F16.gguf": b"earlier"}


def test_killed_export_leaves_no_file_and_the_next_one_cleans_up(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from export import export as e\n"
        "kill = lambda tensor, done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "e.export_models(Path(sys.argv[1]), None, Path(sys.argv[2]), 'm', ['F16'], None, kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(export_module.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code, str(base), str(out)], check=False, env=environment)
    assert killed.returncode == -9
    assert {path.name for path in out.iterdir()} == {".export.journal", ".m-F16.gguf.partial"}
    export_models(base, None, out, "m", ["F16"])
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "m-F16.gguf"]


def test_weights_too_large_for_f16_are_named(base: Path, tmp_path: Path) -> None:
    large = copy_of(base, tmp_path / "large")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = 1e6

    change_weights(large, enlarge)
    with pytest.raises(MedcotError, match=r"blk\.1\.ffn_up\.weight: a weight of magnitude 1e\+06 does not fit F16"):
        export_models(large, None, tmp_path / "out", "m", ["F16"])
    export_models(large, None, tmp_path / "out", "m", ["BF16"])
