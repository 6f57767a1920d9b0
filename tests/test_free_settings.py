"""Which settings keep a training and which begin another, by the train stage's fingerprint."""

from pathlib import Path

import pytest

from pipeline import run as driver
from pipeline.artifacts import CHECKPOINTS_NAME, IN_PROGRESS_NAME, Manifest, read_manifest, write_json, write_manifest
from pipeline.config import Config, load_config

TRAIN = driver.stage_named("train")
# As a run has it whose memory did not suffice: a batch of two, an evaluation on the way that may choose the adapter.
FOUND = (
    "training.max_steps=null", "training.batch_size=2", "training.gradient_accumulation=4", "training.eval_steps=10",
)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose prepare stage is done; the train stage's identity asks for no more."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write_manifest(tmp_path / "data", manifest_of("prepare", "data"))
    return tmp_path


def manifest_of(stage: str, fingerprint: str, **result: object) -> Manifest:
    return Manifest(
        stage=stage, fingerprint=fingerprint, config={}, inputs={}, versions={}, created="", seconds=1.0,
        peak_memory_bytes=1, files=[], result=dict(result),
    )  # fmt: skip


def config_of(run_dir: Path, *settings: str) -> Config:
    return load_config(None, [f"model.base={run_dir / 'base'}", "name=tiny", *settings])


def fingerprint(run_dir: Path, *settings: str) -> str:
    return driver.identify(TRAIN, config_of(run_dir, *settings), run_dir).fingerprint


FREE = [
    ("training.eval_batch_size=1",),
    ("training.logging_steps=7",),
    ("training.checkpoint_steps=50",),
    ("training.max_minutes=600",),
    ("training.processes=2",),
    ("training.report_to=tensorboard",),
    ("training.gradient_checkpointing=false",),
    ("training.batch_size=1", "training.gradient_accumulation=8"),
    ("training.batch_size=4", "training.gradient_accumulation=2"),
    ("training.batch_size=auto", "training.step_examples=8"),
    ("training.step_examples=3",),  # of batch_size auto only
    ("bench.repeats=1", "evaluation.rows=2", "export.imatrix=none", "verify.prompts=1"),
]


@pytest.mark.parametrize("change", FREE, ids=lambda change: change[0])
def test_a_finished_training_survives_what_cannot_change_it(run_dir: Path, change: tuple[str, ...]) -> None:
    write_manifest(run_dir / "adapter", manifest_of("train", fingerprint(run_dir, *FOUND), finished=True))
    assert driver.finished_artifact(TRAIN, config_of(run_dir, *FOUND, *change), run_dir) is not None


@pytest.mark.parametrize("change", FREE, ids=lambda change: change[0])
def test_an_unfinished_training_keeps_its_checkpoints(
    run_dir: Path, change: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run_dir / "adapter" / CHECKPOINTS_NAME / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    write_json(run_dir / "adapter" / IN_PROGRESS_NAME, {"fingerprint": fingerprint(run_dir, *FOUND)})
    config = config_of(run_dir, *FOUND, *change)

    def train(stage: driver.Stage, _: Path) -> None:
        assert checkpoint.is_dir(), "the checkpoint is gone before training could resume from it"
        identity = driver.identify(stage, config, run_dir)
        write_manifest(run_dir / "adapter", manifest_of("train", identity.fingerprint, finished=True))

    monkeypatch.setattr(driver, "_run_in_process", train)
    outcome = driver.run(config, run_dir, only="train", plan_first=False)
    assert outcome.stages[0].status == "resumed" and read_manifest(run_dir / "adapter") is not None


@pytest.mark.parametrize(
    "change",
    [
        ("training.batch_size=4",),  # sixteen examples a step
        ("training.learning_rate=1e-5",),
        ("training.epochs=3",),
        ("training.max_steps=30",),
        ("training.eval_steps=5",),  # keep: best chooses among other evaluations
        ("training.keep=last",),
        ("training.patience=2",),
        ("training.warmup_steps=9",),
        ("training.optimizer=adamw_torch",),
        ("model.load_in_4bit=false",),
        ("model.dtype=float32",),
        ("model.max_seq_length=512",),
        ("lora.dropout=0.1",),
        ("prompt.system=Careful.",),
        ("seed=7",),
    ],
    ids=lambda change: change[0],
)
def test_what_changes_the_adapter_is_another_training(run_dir: Path, change: tuple[str, ...]) -> None:
    assert fingerprint(run_dir, *FOUND, *change) != fingerprint(run_dir, *FOUND)


@pytest.mark.parametrize(
    ("given", "change"),
    [
        (["training.keep=last"], ["training.eval_steps=5"]),  # evaluations that only measure
        ([], ["training.keep=last"]),  # without evaluations on the way there is only the last adapter
        (["training.max_steps=30"], ["training.epochs=3"]),
        (["training.warmup_steps=5"], ["training.warmup_ratio=0.1"]),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_that_another_one_overrides_change_nothing(run_dir: Path, given: list[str], change: list[str]) -> None:
    assert fingerprint(run_dir, *given, *change) == fingerprint(run_dir, *given)


@pytest.mark.parametrize("before", ["finished", "stopped by a gate"])
@pytest.mark.parametrize("llama", ["the same llama.cpp", "another llama.cpp"])
def test_an_evaluation_with_other_settings_keeps_its_records(
    run_dir: Path, before: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, folder = driver.stage_named("evaluate"), run_dir / "eval"
    for name in ("adapter", "gguf"):
        write_manifest(run_dir / name, manifest_of(name, name))
    old = driver.identify(stage, config_of(run_dir), run_dir)
    versions = old.versions if llama.startswith("the same") else {**old.versions, "llama-cpp-python": "0.1"}
    folder.mkdir()
    (folder / "records-a.gguf.jsonl").write_text("{}\n")
    (folder / "evaluation.json").write_text("{}")
    (folder / "failure.json").write_text("{}")
    if before == "finished":
        write_manifest(folder, manifest_of("evaluate", old.fingerprint).model_copy(update={"versions": versions}))
    else:
        write_json(folder / IN_PROGRESS_NAME, {"fingerprint": old.fingerprint, "versions": versions})
    config = config_of(run_dir, "evaluation.gates={format: '>= 0.1'}", "evaluation.rows=9")
    found: list[str] = []

    def evaluate(stage: driver.Stage, _: Path) -> None:
        found.extend(sorted(path.name for path in folder.iterdir()))
        identity = driver.identify(stage, config, run_dir)
        write_manifest(folder, manifest_of("evaluate", identity.fingerprint))

    monkeypatch.setattr(driver, "_run_in_process", evaluate)
    driver.run(config, run_dir, only="evaluate", plan_first=False)
    assert found == [IN_PROGRESS_NAME, *(["records-a.gguf.jsonl"] if llama.startswith("the same") else [])]


def test_an_importance_matrix_is_known_by_content_and_name_wherever_it_lies(run_dir: Path) -> None:
    stage = driver.stage_named("export")
    write_manifest(run_dir / "adapter", manifest_of("train", "adapter"))
    found = {}
    for place, text in (("here", "squares"), ("there", "squares"), ("elsewhere", "others")):
        path = run_dir / place / "m.imatrix.gguf"
        path.parent.mkdir()
        path.write_text(text)
        found[place] = driver.identify(stage, config_of(run_dir, f"export.imatrix={path}"), run_dir).fingerprint
    assert found["here"] == found["there"] != found["elsewhere"]


def test_with_patience_the_evaluations_count(run_dir: Path) -> None:
    patient = ["training.keep=last", "training.patience=2", "training.eval_steps=10"]
    assert fingerprint(run_dir, *patient, "training.eval_steps=5") != fingerprint(run_dir, *patient)
