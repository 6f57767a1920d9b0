"""Divergence of a quantized model from the one it was made of, and the experiment that reports an imatrix's gain."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import save_model

from bench.divergence import REFERENCE, Divergence, compare, divergence, mean_per_token, summarize
from bench.importance_gain import main
from export.export import export_models
from export.gguf_model import GgufModel
from pipeline.prompts import Example

pytestmark = pytest.mark.broad


RECORD = {"question": "Is 5 mg enough?", "reasoning": "Probably it is.", "answer": "Yes, it is."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("divergence")
    export_models(save_model(out / "base"), None, out, "m", ["F16", "Q4_0"])
    return out


def test_against_a_computation_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    logits = np.log([p, q, p]).astype(np.float32) + 3.0  # softmax takes no notice of what is added
    found = divergence(logits[[0, 2]], logits[[1, 2]], np.array([1, 0]))
    assert found.tokens == 2 and found.same_top.tolist() == [False, True]
    assert found.kl == pytest.approx([0.5 * math.log(2) + 0.25 * math.log(0.5), 0.0], abs=1e-6)
    assert found.nll == pytest.approx([-math.log(0.5), -math.log(0.5)], rel=1e-5)


def test_a_model_does_not_diverge_from_itself_and_a_quantized_one_does(folder: Path) -> None:
    example = Example(RECORD["question"], RECORD["reasoning"], RECORD["answer"])
    with (
        GgufModel(folder / "m-F16.gguf", n_ctx=256, n_threads=1) as reference,
        GgufModel(folder / "m-F16.gguf", n_ctx=256, n_threads=1) as same,
        GgufModel(folder / "m-Q4_0.gguf", n_ctx=256, n_threads=1) as coarse,
    ):
        encoded = reference.chat_format.encode(example)
        found = compare(reference, {"same": same, "coarse": coarse}, encoded.input_ids, len(encoded.prompt_ids))
        logits = np.concatenate([block.copy() for block in reference.logits(encoded.input_ids)])
    assert found["same"].nll.tolist() == found[REFERENCE].nll.tolist()
    assert not found["same"].kl.any() and found["same"].same_top.all()
    assert found["same"].tokens == len(encoded.completion_ids)
    assert found["coarse"].kl.sum() > 0.01
    start = len(encoded.prompt_ids) - 1
    exact = logits[start:-1].astype(np.float64)
    losses = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(len(exact)), encoded.completion_ids]
    assert found[REFERENCE].nll == pytest.approx(losses, rel=1e-4)


def test_means_are_weighted_by_tokens() -> None:
    agreeing = np.arange(10) < 9, np.arange(30) < 21
    records = [
        Divergence(np.full(10, 2.0), np.full(10, 0.1), agreeing[0]),
        Divergence(np.full(30, 1.0), np.full(30, 7 / 30), agreeing[1]),
    ]
    summary = summarize(records)
    assert summary.tokens == 40
    assert summary.perplexity.value == pytest.approx(math.exp(50 / 40))
    assert summary.mean_kl.value == pytest.approx(0.2)
    assert summary.p99_kl == pytest.approx(7 / 30)
    assert summary.top1_agreement.value == pytest.approx(0.75)
    assert mean_per_token([-1.0, 3.0], [10, 30]).value == pytest.approx(0.05)


def test_the_experiment_writes_what_it_found(folder: Path, tmp_path: Path) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text((json.dumps(RECORD) + "\n") * 2)
    arguments = [folder / "m-F16.gguf", "--train", tmp_path / "train.jsonl", "--data", tmp_path / "eval.jsonl",
                 "--quant", "Q4_0", "--out", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/gain.json").read_text())
    assert set(found["summaries"]) == {"reference", "Q4_0", "Q4_0 + imatrix"}
    plain, weighted = (found["summaries"][name]["mean_kl"]["value"] for name in ("Q4_0", "Q4_0 + imatrix"))
    assert found["mean_kl_change"]["Q4_0"]["value"] == pytest.approx(weighted - plain, abs=1e-9)
    assert plain != weighted
    missing = CliRunner().invoke(main, [str(folder / "m-F16.gguf"), "--data", "x", "--out", str(tmp_path / "out")])
    assert missing.exit_code == 1 and "--train FILE" in missing.output
