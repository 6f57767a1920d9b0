"""Base weights row by row: equal to what PyTorch and bitsandbytes read, and one sentence for what is damaged."""

import json
import re
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from export import safetensors_file
from export.checkpoint_shards import INDEX_NAME
from export.safetensors_file import SafetensorsFile
from export.weights import BaseWeights, check_quantization
from pipeline.errors import MedcotError

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def packed(weight: torch.Tensor, quant_type: str = "nf4", double: bool = True, blocksize: int = 64) -> dict:
    """What a checkpoint of bitsandbytes holds of one weight."""
    data, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=double, blocksize=blocksize
    )
    return {NAME: data, **{f"{NAME}.{part}": value for part, value in state.as_dict(packed=True).items()}}


def unpacked_by_bitsandbytes(tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """bitsandbytes' own result in 32 bit, by two detours around its CPU code (0.50.2).

    As one row: its AVX-512 kernel takes wrong scales where a row is no whole number of blocks. With the padding of the
    last byte: an odd number of weights goes through torch.compile, which takes seconds a shape.
    """
    parts = {name.removeprefix(f"{NAME}."): value for name, value in tensors.items() if name != NAME}
    state = bitsandbytes.functional.QuantState.from_dict(parts, torch.device("cpu"))
    count = int(np.prod(shape))
    state.dtype, state.shape = torch.float32, (1, count + count % 2)
    # Its scalar kernel gives FP4's second zero a sign, which the checkpoint's own table does not.
    return (bitsandbytes.functional.dequantize_4bit(tensors[NAME], state).numpy().reshape(-1)[:count] + 0.0).reshape(
        shape
    )


def folder_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first.view(np.uint32), second.view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 12), (9,), (1, 1), (4, 2, 3)])
def test_rows_of_plain_tensors_are_torchs(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape).to(dtype)
    weights = BaseWeights(folder_of({"before": torch.zeros(3), "w": values}, tmp_path))
    expected = values.float().numpy().reshape(shape[0], -1)
    assert weights.stored("w").shape == shape
    for rows in (
        slice(None), slice(0, 1), slice(2, 99), slice(None, None, 3), slice(5, 2),
        np.arange(shape[0])[::-1], np.array([0] * 4), np.array([], dtype=np.int64),
    ):  # fmt: skip
        assert same_bits(weights.rows("w", rows), expected[rows])


@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_weights_are_bitsandbytes_bit_for_bit(
    quant_type: str, double: bool, blocksize: int, tmp_path: Path
) -> None:
    torch.manual_seed(blocksize)
    # Rows of whole blocks, rows that share blocks, an odd number of columns, and an odd number of weights.
    for number, shape in enumerate([(300, 256), (33, 96), (50, 31), (7, 9), (1, 1), (5000,)]):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        tensors = packed(torch.randn(shape).to(dtype) * 0.02, quant_type, double, blocksize)
        weights = BaseWeights(folder_of(tensors, tmp_path / str(number)))
        expected = unpacked_by_bitsandbytes(tensors, shape).reshape(shape[0], -1)
        assert list(weights.names) == [NAME]
        assert (weights.stored(NAME).shape, weights.stored(NAME).dtype) == (shape, quant_type.upper())
        assert same_bits(weights.rows(NAME, slice(None)), expected)
        some = np.random.default_rng(number).permutation(shape[0])[: shape[0] // 2 + 1]
        assert same_bits(weights.rows(NAME, some), expected[some])


@given(
    columns=st.integers(1, 200),
    blocksize=st.sampled_from([32, 64, 128]),
    rows=st.one_of(
        st.lists(st.integers(0, 39), max_size=60).map(lambda rows: np.array(rows, dtype=np.int64)),
        st.slices(40),
    ),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_of_a_four_bit_tensor(
    columns: int, blocksize: int, rows: np.ndarray | slice, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(columns)
    tensors = packed(torch.randn(40, columns), blocksize=blocksize)
    weights = BaseWeights(folder_of(tensors, tmp_path_factory.mktemp("four_bit")))
    assert same_bits(weights.rows(NAME, rows), unpacked_by_bitsandbytes(tensors, (40, columns))[rows])


def test_small_pieces_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = BaseWeights(folder_of(packed(torch.randn(301, 77)) | {"plain": torch.randn(301, 77)}, tmp_path))
    orders = (slice(None), slice(7, 290, 3), np.random.default_rng(0).permutation(301))
    whole = [weights.rows(name, rows) for name in weights.names for rows in orders]
    for weights_at_a_time in (1, 100, 1000):
        monkeypatch.setattr(safetensors_file, "_PIECE_WEIGHTS", weights_at_a_time)
        again = [weights.rows(name, rows) for name in weights.names for rows in orders]
        assert all(same_bits(*pair) for pair in zip(whole, again, strict=True))


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = BaseWeights(folder_of(packed(torch.randn(600, 96)) | {"plain": torch.randn(600, 96)}, tmp_path))
    jobs = [(name, np.arange(start, 600, 7)) for name in weights.names for start in range(40)]
    alone = [weights.rows(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: weights.rows(*job), jobs))
    assert all(same_bits(*pair) for pair in zip(alone, together, strict=True))


@pytest.fixture(scope="module")
def four_bit_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny Llama that transformers quantized and saved in shards; its q, k, v, o, gate and up are multiples of 64."""
    folder = tmp_path_factory.mktemp("four_bit_model")
    base = save_model(folder / "base", hidden=128, feed_forward=192, tied=False, dtype=torch.bfloat16)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.self_attn"],
    )
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(folder / "saved", max_shard_size="40KB")
    return folder / "saved", model


def test_a_checkpoint_that_transformers_saved(four_bit_model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, model = four_bit_model
    assert len(list(folder.glob("*.safetensors"))) > 5
    weights = BaseWeights(folder)
    modules = dict(model.named_modules())
    plain = LlamaForCausalLM(model.config).state_dict()
    assert set(weights.names) == set(plain)
    kinds = set()
    for name in weights.names:
        values = weights.rows(name, slice(None))
        parameter = modules[name.removesuffix(".weight")].weight
        assert weights.stored(name).shape == tuple(plain[name].shape)
        state = getattr(parameter, "quant_state", None)
        kinds.add((weights.stored(name).dtype, state is not None))
        if state is None:
            expected = parameter.detach().float().numpy()
        else:
            # The state's own dtype is bfloat16: training sees these values rounded to 8 bits of mantissa.
            rounded = bitsandbytes.functional.dequantize_4bit(parameter.data, state).float().numpy()
            np.testing.assert_allclose(values, rounded, rtol=2**-8)
            state.dtype = torch.float32
            expected = bitsandbytes.functional.dequantize_4bit(parameter.data, state).numpy()
            state.dtype = torch.bfloat16
        assert same_bits(values, expected.reshape(values.shape))
    assert kinds == {("NF4", True), ("BF16", False)}
    check_quantization(json.loads((folder / "config.json").read_text()), folder)


def test_scales_in_another_shard_than_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = packed(torch.randn(20, 64))
    expected = unpacked_by_bitsandbytes(tensors, (20, 64))
    for cut in range(1, len(tensors)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        shards = {"a.safetensors": list(tensors)[:cut], "b.safetensors": list(tensors)[cut:]}
        for file, names in shards.items():
            save_file({name: tensors[name] for name in names}, folder / file)
        weight_map = {name: file for file, names in shards.items() for name in names}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        assert same_bits(BaseWeights(folder).rows(NAME, np.array([19, 3, 4])), expected[[19, 3, 4]])


def test_rows_take_little_memory_beside_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = packed(torch.randn(2048, 1024)) | {"plain": torch.randn(2048, 1024).bfloat16()}
    weights = BaseWeights(folder_of(tensors, tmp_path))
    interleaved = np.arange(512, 1536).reshape(-1, 2, 64).swapaxes(1, 2).reshape(-1)
    for name in (NAME, "plain"):
        for rows in (slice(512, 1536), interleaved):
            result_bytes = 1024 * 1024 * 4
            tracemalloc.start()
            weights.rows(name, rows)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # Beside the result a piece: its bytes, indices of 8 bytes for two weights, and twice its values.
            assert peak < result_bytes + 16 * safetensors_file._PIECE_WEIGHTS, (name, peak)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("inf")


def scale_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.nested_absmax"][0] = float("nan")


def scales_cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"][:-1]


def scales_lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{NAME}.absmax"]


def weights_cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:-1]


def weights_lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME]


def state_lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[STATE]


def state_garbled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[STATE][:5] = 0


def state_with(**changed: object) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changed
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def to_float8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(64).to(torch.float8_e4m3fn)


def to_gptq(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.qweight"] = tensors.pop("model.norm.weight").to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, r"model.norm.weight holds NaN or infinite values"),
        (scale_nan, r"up_proj.weight.nested_absmax holds NaN or infinite values; the file is damaged"),
        (scales_cut, r"up_proj.weight.absmax holds 39 x U8, but the 4-bit tensor beside it needs 40 x U8"),
        (scales_lost, r"is stored in 4 bits but .*up_proj.weight.absmax is missing"),
        (weights_cut, r"up_proj.weight has 1279 bytes for 2560 weights of 4 bits"),
        (weights_lost, r"stored in 4 bits but model.layers.0.mlp.up_proj.weight is missing"),
        (state_lost, r"up_proj.weight is stored as U8; export reads F32, F16, BF16 and bitsandbytes' 4-bit"),
        (state_garbled, r"bitsandbytes__nf4 is not the description that bitsandbytes writes"),
        (state_with(shape=None), r"is not the description that bitsandbytes writes"),
        (state_with(blocksize=0), r"describes 'nf4' in blocks of 0 with shape \[40, 64\]"),
        (state_with(quant_type="int4"), r"describes 'int4' in blocks of 64"),
        (state_with(shape=[40, 65]), r"holds 40 x U8, but the 4-bit tensor beside it needs 41 x U8"),
        (state_with(nested_offset=float("nan")), r"is not the description that bitsandbytes writes"),
        (state_with(nested_dtype="bfloat16"), r"is not the description that bitsandbytes writes"),
        (to_float8, r"model.norm.weight is stored as F8_E4M3; export reads"),
        (to_gptq, r"is quantized by GPTQ or AWQ. Export reads 16- and 32-bit safetensors"),
    ],
)
def test_damaged_or_foreign_tensors_are_one_sentence(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tensors = packed(torch.randn(40, 64)) | {"model.norm.weight": torch.ones(64)}
    change(tensors)
    with pytest.raises(MedcotError, match=message) as caught:
        weights = BaseWeights(folder_of(tensors, tmp_path))
        for name in (NAME, "model.norm.weight"):
            weights.rows(name, slice(None))
    assert "\n" not in str(caught.value)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changed: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"\xff" * 8 + b"{}", "truncated or not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{]", "its header is no JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "its header is no JSON"),
        (with_header([1]), "its header is malformed"),
        (with_header({"w": {"dtype": "F32"}}), "its header is malformed"),
        (with_header(entry(shape=["two"]), bytes(8)), "its header is malformed"),
        (with_header(entry(), bytes(7)), r"is truncated: it has \d+ bytes of \d+"),
        (with_header(entry(shape=[3]), bytes(8)), r"size of tensor w does not fit its shape \[3\]"),
        (with_header(entry(shape=[-1, -2]), bytes(8)), "does not fit its shape"),
        (with_header(entry(dtype="F4", data_offsets=[8, 0]), bytes(8)), "does not fit its shape"),
        (with_header(entry(data_offsets=[-8, 0]), bytes(8)), "does not fit its shape"),
    ],
)
def test_malformed_files_are_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MedcotError, match=message):
        BaseWeights(tmp_path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_damage_is_an_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = folder_of(packed(torch.ones(8, 64)) | {"n": torch.ones(4)}, tmp_path_factory.mktemp("damaged"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        weights = BaseWeights(folder)
        for name in weights.names:
            weights.rows(name, slice(None))
    except MedcotError as error:
        assert "\n" not in str(error)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    weights = BaseWeights(folder_of({"w": torch.ones(1000, 10)}, tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(MedcotError, match="became shorter while it was read"):
        weights.rows("w", slice(900, 1000))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "names no shards"),
        ({}, "names no shards"),
        ({"weight_map": {"a": "missing.safetensors"}}, r"lacks missing.safetensors \(found"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, r"outside the model's folder \(\.\./elsewhere"),
        ({"weight_map": {"b": "one.safetensors"}}, "one.safetensors lacks tensor b, which"),
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "Tensor a is in .*two.* and in .*one"),
    ],
)
def test_an_index_that_does_not_fit(index: object, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MedcotError, match=message):
        BaseWeights(tmp_path)


def test_a_folder_with_pickles_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MedcotError, match=r"PyTorch pickles \(pytorch_model.bin\) only; export reads safetensors"):
        BaseWeights(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantized by gptq. Export reads 16- and 32-bit"),
        ({"quant_method": "awq"}, "is quantized by awq"),
        ({"quant_method": "fp8"}, "is quantized by fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, re.escape("bitsandbytes' LLM.int8()")),
        ({"bits": 4}, "is quantized by an unnamed method"),
        ("4bit", "quantization_config must be an object, found '4bit'"),
    ],
)
def test_other_quantizations_are_named(settings: object, message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        check_quantization({"quantization_config": settings}, "config.json")


def test_what_can_be_read_is_accepted() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {"load_in_4bit": True}}):
        check_quantization(config, "config.json")


def test_numbers_and_gaps_in_a_file(tmp_path: Path) -> None:
    tensors = {"number": torch.tensor(2.5), "empty": torch.zeros(0, 4), "counter": torch.tensor([3])}
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.rows("number", slice(None)).tolist() == [[2.5]]
    assert file.rows("empty", slice(None)).shape == (0, 4)
    assert load_file(tmp_path / "x.safetensors")["counter"].tolist() == [3]
    with pytest.raises(MedcotError, match="counter is stored as I64"):
        file.rows("counter", slice(None))
