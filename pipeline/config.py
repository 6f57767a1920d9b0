"""Typed configuration: defaults live here once, presets and ``--set`` change them, every error is told at once.

For example ``medcot run deepseek-r1-8b --set training.max_steps=10``.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import MedcotError
from pipeline.gates import Gate, parse_gate
from pipeline.yaml_errors import YAML_ERRORS

PRESETS_DIR = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_PRESET = "smollm2-cpu"
MAX_DEPTH = 4  # levels of settings, with one to spare: data.columns.question has three
KvType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


Validated = TypeVar("Validated", bound=BaseModel)


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
    too_long: Literal["drop", "cut", "truncate"] = Field(
        "drop",
        description="A record longer than model.max_seq_length: rejected (drop); its reasoning cut at sentences, never "
        "its answer (cut); or its tokens cut off there, the end of its answer and of the turn with them (truncate).",
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

    @field_validator("system")
    @classmethod
    def _says_something(cls, system: str | None) -> str | None:
        if system is not None and not system.strip():
            raise ValueError("the system prompt is empty; null is none")
        return system


class LoraConfig(Section):
    r: int = Field(16, ge=1, le=1024, description="Rank.")
    alpha: int = Field(16, ge=1, description="The adapter's change is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


def _auto_or_count(value: Any) -> Any:
    # A union's own errors would be two for one mistake.
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("a whole number from 1 on, or auto")


def _auto_or_switch(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("true, false or auto")


AutoOrSwitch = Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_switch)]
AutoOrCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]


class TrainingConfig(Section):
    epochs: float = Field(1.0, gt=0, description="Passes over the training data, unless max_steps is set.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: AutoOrCount = Field(
        2, description="Examples per forward pass; auto: as many as fit, halved by itself when memory runs out."
    )
    gradient_accumulation: int = Field(
        4, ge=1, description="Forward passes per optimizer step; with batch_size auto it follows from step_examples."
    )
    step_examples: int = Field(8, ge=1, description="Examples per optimizer step where batch_size is auto.")
    processes: AutoOrCount = Field(
        "auto",
        description="Processes that share an optimizer step's examples, on one machine; auto: one a GPU, as far as "
        "the examples can be shared evenly.",
    )
    learning_rate: float = Field(2e-4, gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(5, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the steps; used when warmup_steps is 0.")
    weight_decay: float = Field(0.01, ge=0)
    optimizer: str = Field("adamw_8bit", description="A transformers optimizer name; 8-bit ones become AdamW on CPU.")
    gradient_checkpointing: AutoOrSwitch = Field(
        True, description="Recompute activations: less memory, slower; auto: only where the memory needs it."
    )
    logging_steps: int = Field(1, ge=1)
    checkpoint_steps: int = Field(20, ge=1, description="Steps between checkpoints.")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="End training in time, with a usable adapter; the same command goes on with it. For sessions that "
        "are cut off, as Kaggle's after 12 hours.",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations on the held-out records; null: only before and after."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop early after so many evaluations without a lower loss; needs eval_steps."
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Which adapter to keep: of the evaluation with the lowest loss, or of the last step."
    )
    eval_batch_size: int = Field(4, ge=1)
    report_to: Literal["auto", "none", "wandb", "wandb-offline", "tensorboard"] = Field(
        "auto",
        description="Where metrics go besides metrics.jsonl; auto: to W&B where WANDB_MODE or WANDB_PROJECT is set.",
    )

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step, over all processes."""
        return self.step_examples if self.batch_size == "auto" else self.batch_size * self.gradient_accumulation

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> TrainingConfig:
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("patience counts evaluations during training: set eval_steps too")
        return self


class ExportConfig(Section):
    quantizations: tuple[str, ...] = Field(("F16", "Q4_K_M"), min_length=1, description="GGUF types to write.")
    ship: str = Field("Q4_K_M", description="The quantization to chat with and to evaluate; one of the above.")
    imatrix: str = Field(
        "auto",
        min_length=1,
        description="Importance matrix: auto (measured on the training text), none, or a file of llama-imatrix.",
    )
    imatrix_tokens: int = Field(2048, ge=64, description="Tokens of the training text that auto measures on.")
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
    choice_rows: int | None = Field(
        None, ge=0, description="Of those with options, how many to ask as multiple choice too; null: all."
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="End in time with the records measured by then; continues with the rest once it is raised.",
    )
    engine: Literal["auto", "llama.cpp", "transformers"] = Field(
        "auto",
        description="What writes the answers: the GGUFs under llama.cpp, or base and adapter under transformers; auto: "
        "transformers where there is a GPU that the installed llama.cpp cannot use.",
    )
    gates: dict[str, str] = Field(
        {},
        description="Metric -> better, not worse (than the base), '>= NUMBER' or '<= NUMBER'; a run whose evaluation "
        "misses one ends with exit status 3.",
    )

    @field_validator("gates")
    @classmethod
    def _gates_can_be_checked(cls, gates: dict[str, str]) -> dict[str, str]:
        for name, condition in gates.items():
            parse_gate(name, condition)
        return gates

    @property
    def parsed_gates(self) -> list[Gate]:
        return [parse_gate(name, condition) for name, condition in self.gates.items()]


class QualityBudget(Section):
    """What a recommended file may lose against the most exact one, on held-out text."""

    max_mean_kl: float = Field(0.1, gt=0, description="Mean Kullback-Leibler divergence (nats a token).")
    min_top1_agreement: float = Field(0.85, ge=0, le=1, description="Both find the same token likeliest.")


class BenchConfig(Section):
    prompt_tokens: int = Field(512, ge=1)
    generated_tokens: int = Field(128, ge=1)
    repeats: int = Field(5, ge=1)
    transformers: bool = Field(True, description="Also measure base + adapter under transformers.")
    depths: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="Tokens in the context before a GGUF's speed test; 0 is always measured."
    )
    threads: int | None = Field(None, ge=1, description="Null: one per physical core.")
    context_tokens: int | None = Field(None, ge=64, description="Null: what the tests need, 512 at least.")
    flash_attention: bool = Field(False, description="llama.cpp's; quantized kv_type needs it.")
    kv_type: KvType = Field("f16", description="ggml type of cached keys and values.")
    gpu_layers: int = Field(0, ge=-1, description="Layers on the GPU where llama.cpp has one; -1 all.")
    quality_records: int = Field(8, ge=0, description="Held-out records to compare the GGUFs on; 0: do not.")
    quality_budget: QualityBudget = Field(default_factory=lambda: QualityBudget.model_validate({}))
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="End in time: fewer repeats of each file, then without transformers and the comparison of quality.",
    )
    memory_budget_gb: float | None = Field(
        8.0, gt=0, description="A recommended file's process stays below this (1e9 bytes). Null: no limit."
    )

    @model_validator(mode="after")
    def _quantized_cache_has_flash_attention(self) -> BenchConfig:
        if self.kv_type.startswith("q") and not self.flash_attention:
            raise ValueError(f"kv_type {self.kv_type} needs flash_attention: true (llama.cpp)")
        return self


class ReferenceRun(Section):
    """A published training of the same recipe, to hold ours against."""

    # In a chart's legend a leading underscore hides an entry, and dollars hold a formula.
    name: str = Field(pattern=r"^[A-Za-z0-9][^$]*$", max_length=40)
    source: str = Field(min_length=1, description="Where its losses were published.")
    loss: dict[Annotated[int, Field(ge=0)], float] = Field(min_length=1, description="Training loss by optimizer step.")


class ReportConfig(Section):
    reference_runs: tuple[ReferenceRun, ...] = Field((), description="Published losses to show beside this run's.")


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
    report: ReportConfig = Field(default_factory=lambda: ReportConfig.model_validate({}))

    @model_validator(mode="after")
    def _gates_have_a_base(self) -> Config:
        relative = [gate.metric.key for gate in self.evaluation.parsed_gates if gate.needs_reference]
        if relative and not self.export.include_base:
            raise ValueError(
                f"evaluation.gates compares {relative[0]} with the base's, which export.include_base=false leaves out"
            )
        return self

    @property
    def truncated_at(self) -> int | None:
        """Tokens after which records are cut off; None where none may be longer than model.max_seq_length."""
        return self.model.max_seq_length if self.data.too_long == "truncate" else None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Override:
    """One setting changed from outside its file; ``origin`` says where, for whoever has to correct it."""

    key: str
    value: Any
    origin: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """The ``key=value`` of ``--set``; raises MedcotError."""
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise MedcotError(f"--set {text}: write it as key=value, for example training.max_steps=10")
        try:
            return cls(key, yaml.safe_load(value) if value else None, f"--set {text}")
        except YAML_ERRORS as error:
            raise MedcotError(f"--set {text}: the value is not valid YAML") from error


@dataclass(frozen=True)
class Settings:
    """What a YAML file holds before it is validated; ``origins`` gives each dotted key's place ("file:line")."""

    path: Path
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[str]

    def validated(self, schema: type[Validated]) -> Validated:
        """Raises MedcotError listing every problem with its file, line and key."""
        problems = list(self.problems)
        try:
            result = schema.model_validate(self.values)
        except ValidationError as error:
            problems += [_explain(detail, schema, self) for detail in error.errors()]
        raise_all(problems)
        return result

    def origin(self, *location: str | int) -> str:
        """The place of a key, or of the nearest one around it that was written down."""
        around = (".".join(map(str, location[:n])) for n in range(len(location), 0, -1))
        return next((self.origins[key] for key in around if key in self.origins), str(self.path))


def raise_all(problems: Sequence[str]) -> None:
    """All problems as one MedcotError on one line, if there are any."""
    if problems:
        raise MedcotError("; ".join(" ".join(problem.split()) for problem in problems))


def preset_names(folder: Path = PRESETS_DIR) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_config(name_or_path: str | None = None, overrides: Sequence[str | Override] = ()) -> Config:
    """Resolve a preset's name or a YAML path, then overrides (``key=value`` as text), to a Config.

    Raises MedcotError listing every problem with its file, line and key.
    """
    settings = read_settings(settings_path(name_or_path or DEFAULT_PRESET))
    parsed = []
    for given in overrides:
        try:
            parsed.append(Override.parse(given) if isinstance(given, str) else given)
        except MedcotError as error:
            settings.problems.append(str(error))
    for override in [*_without_revisions_of_others(settings, parsed), *parsed]:
        try:
            _apply(settings, override)
        except MedcotError as error:
            settings.problems.append(str(error))
    return settings.validated(Config)


def _without_revisions_of_others(settings: Settings, overrides: Sequence[Override]) -> Iterator[Override]:
    """A commit belongs to its repository: the file's says nothing of another one that an override names."""
    for section, repository in (("model", "base"), ("data", "source")):
        given = settings.values.get(section)
        named = [override for override in overrides if override.key == f"{section}.{repository}"]
        if isinstance(given, dict) and given.get("revision") and named and named[-1].value != given.get(repository):
            yield Override(f"{section}.revision", None, named[-1].origin)


def settings_path(name_or_path: str, folder: Path = PRESETS_DIR) -> Path:
    """The file of a preset in ``folder``, or of a path; raises MedcotError when there is neither."""
    if name_or_path in preset_names(folder):
        return folder / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise MedcotError(f"{name_or_path!r} is a folder, not a configuration file: name the YAML file inside it.")
    except OSError as error:
        raise MedcotError(f"{name_or_path!r:.80} cannot be looked up: {error.strerror}.") from error
    raise MedcotError(
        f"No preset and no file is called {name_or_path!r}: presets are {', '.join(preset_names(folder))}."
    )


def read_settings(path: Path) -> Settings:
    """Read a YAML file; its name is the setting ``name`` unless it says otherwise. Raises MedcotError."""
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
        values = {}
    if not isinstance(values, dict):
        raise MedcotError(f"{path} must hold settings as 'key: value' lines, not a {type(values).__name__}.")
    lines: dict[str, int] = {}
    problems = []
    for key, line in _keys_with_lines(node):
        if key in lines:
            problems.append(f"{path}:{line}: {key} is set twice (first on line {lines[key]})")
        lines[key] = line
    values.setdefault("name", path.stem)
    return Settings(path, values, {key: f"{path}:{line}" for key, line in lines.items()}, problems)


def _keys_with_lines(node: yaml.Node | None, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    # An alias can make a mapping contain itself; no setting lies deeper than this.
    if depth > MAX_DEPTH:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            if isinstance(item, yaml.MappingNode):
                yield from _keys_with_lines(item, f"{prefix}{index}.", depth + 1)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        yield from _keys_with_lines(value_node, f"{key}.", depth + 1)


def _apply(settings: Settings, override: Override) -> None:
    *sections, last = override.key.split(".")
    target = settings.values
    for depth, section in enumerate(sections, start=1):
        settings.origins.setdefault(".".join(sections[:depth]), override.origin)
        inner = target.setdefault(section, {})
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise MedcotError(f"{override.origin}: {section} is a value, not a section")
        target = inner
    target[last] = override.value
    settings.origins[override.key] = override.origin


def _explain(detail: Any, schema: type[BaseModel], settings: Settings) -> str:
    location = [str(part) for part in detail["loc"] if not isinstance(part, int)]
    key = ".".join(location)
    where = settings.origin(*detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = sorted(_section_at(schema, location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key} ({hint})"
    message = detail["msg"].removeprefix("Value error, ")
    # reprlib stops inside nested values; aliases can make their whole text astronomically long.
    shown = f"{reprlib.repr(detail['input']):.80}"
    return f"{where}: {key or 'configuration'}: {message[0].lower()}{message[1:]} (found {shown})"


def _section_at(schema: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    section = schema
    for part in location:
        annotation = section.model_fields[part].annotation
        inner = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
        inner = [each for each in inner if issubclass(each, BaseModel)]
        if not inner:
            break
        section = inner[0]
    return section
