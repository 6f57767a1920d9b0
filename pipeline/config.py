"""Typed configuration: defaults live here once, presets and ``--set`` change them, every error is told at once.

For example ``medcot run deepseek-r1-8b --set training.max_steps=10``.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import MedcotError

PRESETS_DIR = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_PRESET = "smollm2-cpu"
MAX_DEPTH = 4  # levels of settings, with one to spare: data.columns.question has three
# PyYAML's constructors fail each in their own way on what they cannot build: '!!int', '!!timestamp x', '{[]: 1}'.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Section(BaseModel):
    """A group of settings; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    base: str = Field(
        "unsloth/DeepSeek-R1-Distill-Llama-8B",
        description="Hub id, local folder, or package:<module>/<file>.gguf for a GGUF inside a Python package.",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    load_in_4bit: bool = Field(True, description="Keep the frozen base weights in bitsandbytes NF4.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Computation type; auto takes what the hardware does natively."
    )
    max_seq_length: int = Field(2048, ge=64, le=131072, description="Longest example, prompt included (tokens).")


class Columns(Section):
    question: str = "Question"
    reasoning: str | None = Field("Complex_CoT", description="Null for data without a chain of thought.")
    answer: str = "Response"
    options: str | None = Field("options", description="Optional column: a mapping letter -> text.")
    answer_idx: str | None = Field("answer_idx", description="Optional column: the right option's letter.")


class DataConfig(Section):
    source: str = Field(
        "sample",
        description="'sample' (packaged), a JSONL, JSON, CSV or Parquet file, a folder of them, or a hub data set id.",
    )
    config: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    limit: int | None = Field(None, ge=2, description="Read only the first so many records.")
    columns: Columns = Field(default_factory=lambda: Columns.model_validate({}))
    min_characters: int = Field(1, ge=1, description="A record with a shorter question or answer is rejected.")
    too_long: Literal["drop", "cut"] = Field(
        "drop",
        description="A record longer than model.max_seq_length: rejected, or its reasoning cut at sentences, never "
        "its answer.",
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="A record that repeats an earlier one, exactly or nearly: rejected, or counted only."
    )
    near_duplicate_similarity: float = Field(
        0.8, gt=0, le=1, description="Nearly the same: this share of two records' word triples is common to both."
    )
    leakage: Literal["drop", "keep"] = Field(
        "drop", description="A training record that gives a held-out one away: rejected, or counted only."
    )
    leakage_overlap: float = Field(
        0.5, gt=0, le=1, description="Given away: training has this share of a held-out record's 8-grams of words."
    )
    shuffle: bool = Field(True, description="Shuffle with the run's seed before splitting.")
    train_rows: int | None = Field(None, ge=1, description="Records to train on; null takes all that remain.")
    eval_rows: int = Field(50, ge=1, description="Records held out of training: the ones after those in order.")


class PromptConfig(Section):
    system: str | None = Field(None, description="System prompt; null leaves it to the template (R1: none).")


class LoraConfig(Section):
    r: int = Field(16, ge=1, le=1024, description="Rank.")
    alpha: int = Field(16, ge=1, description="The adapter's change is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class TrainingConfig(Section):
    epochs: float = Field(1.0, gt=0, description="Passes over the training data, unless max_steps is set.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: int = Field(2, ge=1, description="Examples per forward pass.")
    gradient_accumulation: int = Field(4, ge=1, description="Forward passes per optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(5, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the steps; used when warmup_steps is 0.")
    weight_decay: float = Field(0.01, ge=0)
    optimizer: str = Field("adamw_8bit", description="A transformers optimizer name; 8-bit ones become AdamW on CPU.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations: less memory, slower.")
    logging_steps: int = Field(1, ge=1)
    checkpoint_steps: int = Field(20, ge=1, description="Steps between checkpoints.")
    eval_batch_size: int = Field(4, ge=1)
    report_to: Literal["none", "wandb", "tensorboard"] = Field("none", description="Where to send metrics besides.")


class ExportConfig(Section):
    quantizations: tuple[str, ...] = Field(("F16", "Q4_K_M"), min_length=1, description="GGUF types to write.")
    ship: str = Field("Q4_K_M", description="The quantization to chat with and to evaluate; one of the above.")
    imatrix: str = Field(
        "auto",
        min_length=1,
        description="Importance matrix: auto (measured on the training text), none, or a file of llama-imatrix.",
    )
    include_base: bool = Field(
        True, description="Also write the base without the adapter in the shipped type: the fair comparison."
    )

    @model_validator(mode="after")
    def _ship_is_written(self) -> ExportConfig:
        if self.ship not in self.quantizations:
            raise ValueError(f"ship is {self.ship}, which is not among quantizations {list(self.quantizations)}")
        return self


class VerifyConfig(Section):
    max_logit_nmse: float = Field(
        1e-4, gt=0, description="F16 against base + adapter: normalized mean square error of the logits."
    )
    min_top1_agreement: float = Field(0.995, ge=0, le=1, description="F16 against base + adapter.")
    prompts: int = Field(4, ge=1, description="Held-out conversations whose logits are compared.")
    max_new_tokens: int = Field(
        0, ge=0, description="Also answer a held-out question, up to this length (tokens); 0: leave that to evaluation."
    )


class EvaluationConfig(Section):
    rows: int = Field(24, ge=1, description="Held-out records to answer.")
    max_new_tokens: int = Field(1024, ge=1)


class BenchConfig(Section):
    prompt_tokens: int = Field(512, ge=1)
    generated_tokens: int = Field(128, ge=1)
    repeats: int = Field(5, ge=1)
    transformers: bool = Field(True, description="Also measure base + adapter under transformers.")


class Config(Section):
    """Everything a run depends on; written to ``runs/<name>/config.yaml`` in full."""

    name: str = Field(
        "run", max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder and GGUFs."
    )
    seed: int = Field(42, ge=0, lt=2**32)
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    prompt: PromptConfig = Field(default_factory=lambda: PromptConfig.model_validate({}))
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig.model_validate({}))
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    export: ExportConfig = Field(default_factory=lambda: ExportConfig.model_validate({}))
    verify: VerifyConfig = Field(default_factory=lambda: VerifyConfig.model_validate({}))
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig.model_validate({}))
    bench: BenchConfig = Field(default_factory=lambda: BenchConfig.model_validate({}))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_config(name_or_path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Resolve a preset's name or a YAML path, then ``key=value`` overrides, to a Config.

    Raises MedcotError listing every problem with its file, line and key.
    """
    path = _config_path(name_or_path or DEFAULT_PRESET)
    values, lines, problems = _read_yaml(path)
    values.setdefault("name", path.stem)
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        problem = _apply_override(values, origins, override)
        if problem:
            problems.append(problem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, origins, path) for detail in error.errors()]
    if problems:
        raise MedcotError("; ".join(" ".join(problem.split()) for problem in problems))
    return config


def _config_path(name_or_path: str) -> Path:
    if name_or_path in preset_names():
        return PRESETS_DIR / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise MedcotError(f"{name_or_path!r} is a folder, not a configuration file: name the YAML file inside it.")
    except OSError as error:
        raise MedcotError(f"{name_or_path!r:.80} cannot be looked up: {error.strerror}.") from error
    raise MedcotError(f"No preset and no file is called {name_or_path!r}: presets are {', '.join(preset_names())}.")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """The file's values, the line of each dotted key, and what is wrong with it beyond the schema."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = " ".join((getattr(error, "problem", None) or str(error) or type(error).__name__).split())
        raise MedcotError(f"{where} is not valid YAML: {reason}.") from error
    if values is None:
        return {}, {}, []
    if not isinstance(values, dict):
        raise MedcotError(f"{path} must hold settings as 'key: value' lines, not a {type(values).__name__}.")
    lines: dict[str, int] = {}
    problems = []
    for key, line in _keys_with_lines(node):
        if key in lines:
            problems.append(f"{path}:{line}: {key} is set twice (first on line {lines[key]})")
        lines[key] = line
    return values, lines, problems


def _keys_with_lines(node: yaml.Node | None, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    # An alias can make a mapping contain itself; no setting lies deeper than this.
    if not isinstance(node, yaml.MappingNode) or depth > MAX_DEPTH:
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        yield from _keys_with_lines(value_node, f"{key}.", depth + 1)


def _apply_override(values: dict[str, Any], origins: dict[str, str], override: str) -> str | None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        return f"--set {override}: write it as key=value, for example training.max_steps=10"
    try:
        value = yaml.safe_load(text) if text else None
    except YAML_ERRORS:
        return f"--set {override}: the value is not valid YAML"
    *sections, last = key.split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            return f"--set {override}: {section} is a value, not a section"
        target = inner
    target[last] = value
    origins[key] = f"--set {override}"
    return None


def _explain(detail: Any, origins: dict[str, str], path: Path) -> str:
    location = [str(part) for part in detail["loc"] if not isinstance(part, int)]
    key = ".".join(location)
    where = next(
        (origins[".".join(location[:n])] for n in range(len(location), 0, -1) if ".".join(location[:n]) in origins),
        str(path),
    )
    if detail["type"] == "extra_forbidden":
        known = sorted(_section_at(location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key} ({hint})"
    message = detail["msg"].removeprefix("Value error, ")
    # reprlib stops inside nested values; aliases can make their whole text astronomically long.
    shown = f"{reprlib.repr(detail['input']):.80}"
    return f"{where}: {key or 'configuration'}: {message[0].lower()}{message[1:]} (found {shown})"


def _section_at(location: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return section
