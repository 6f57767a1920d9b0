import json
from pathlib import Path

import pytest
from conftest import shared_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_model

from pipeline.base_model import load_chat_format
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.prepare import load_records, prepare, select
from pipeline.prompts import ChatFormat
from pipeline.results import PreparedData


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def formatted(base: Path) -> ChatFormat:
    return load_chat_format(base)


def row(number: int, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "Question": f"What is finding number {number}?",
        "Complex_CoT": "Okay, it is this.",
        "Response": "This.",
    }
    return values | changes


def configured(base: Path, source: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.base={base}", f"data.source={source}", "data.eval_rows=2", *overrides])


def run(base: Path, tmp_path: Path, lines: list[str], *overrides: str) -> tuple[PreparedData, Path]:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    out = tmp_path / "out"
    return prepare(configured(base, source, *overrides), {}, out), out


def test_every_row_ends_in_exactly_one_place_with_its_reason(base: Path, tmp_path: Path) -> None:
    good = [json.dumps(row(i)) for i in range(5)]
    bad = {
        "unreadable": '{"Question": "cut',
        "missing column": json.dumps({"Question": "x", "Response": "y"}),
        "not text": json.dumps(row(90, Response=5)),
        "too short": json.dumps(row(91, Response="  ")),
        "empty": json.dumps(row(92, Complex_CoT="")),
        "duplicate question": json.dumps(row(0, Question="what  is finding number 0?")),
        "think tag in the text": json.dumps(row(93, Complex_CoT="a </think> b")),
        "too long": json.dumps(row(94, Response="word " * 2000)),
        "answer_idx is none of the options": json.dumps(row(95, options={"A": "x"}, answer_idx="B")),
        "options are not a mapping of letters to texts": json.dumps(row(96, options=["x"], answer_idx="A")),
    }
    result, out = run(base, tmp_path, [*good, *bad.values(), "", "[1, 2]", '{"Question": "\\ud800 half"}'])
    assert result.read == result.train_rows + result.eval_rows + result.unused_rows + result.rejected == 17
    assert (result.train_rows, result.eval_rows) == (3, 2)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    by_reason = {reject["reason"]: reject for reject in rejects}
    assert set(bad) <= set(by_reason)
    assert by_reason["missing column"]["number"] == 7
    assert "same as" in by_reason["duplicate question"]["detail"]
    assert result.reject_reasons["unreadable"] == 2


def test_split_is_reproducible_and_disjoint(base: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row(i)) for i in range(12)]
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, out = run(base, tmp_path / name, lines)
        contents.append([[r["question"] for r in load_records(out / f"{part}.jsonl")] for part in ("train", "eval")])
    assert contents[0] == contents[1]
    train, held_out = contents[0]
    assert (len(train), len(held_out)) == (10, 2) and not set(train) & set(held_out)


def test_train_rows_and_limit(base: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row(i)) for i in range(20)]
    result, _ = run(base, tmp_path, lines, "data.limit=10", "data.train_rows=5", "data.shuffle=false")
    assert (result.read, result.train_rows, result.eval_rows, result.unused_rows) == (10, 5, 2, 3)


def test_too_few_rows_say_what_was_rejected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"gives 1 usable records.*missing column: 2"):
        run(base, tmp_path, [json.dumps(row(1)), "{}", "{}"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", "does not exist"),
        ("a/b/c", "does not exist"),
        (".", "is a folder"),
        ("README.md", "reads .jsonl and .json"),
    ],
)
def test_sources_that_lead_nowhere(base: Path, source: str, message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        select(configured(base, Path(source)), load_chat_format(base))


def test_a_json_list_is_read_like_lines(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(i) for i in range(4)]))
    records, rejects = select(configured(base, path), load_chat_format(base))
    assert (len(records), rejects) == (4, [])


def test_flashcard_columns_without_reasoning(tmp_path: Path) -> None:
    shared = Path("../shared/data/medquad_flashcards.jsonl")
    if not shared.is_file():
        pytest.skip("../shared/data is not beside the project")
    folder = shared_tokenizer("tinyllama-1.1b-chat")
    overrides = [f"data.source={shared}", f"model.base={folder}", "data.limit=300"]
    config = load_config("tinyllama-flashcards", overrides)
    records, rejects = select(config, load_chat_format(folder))
    assert len(records) + len(rejects) == 300
    assert len(records) > 200 and all(record.example.reasoning is None for record in records)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["Question", "Complex_CoT", "Response", "options", "answer_idx"]), JSON_VALUES)
        | JSON_VALUES,
        max_size=4,
    )
)
def test_any_rows_are_used_or_rejected_and_none_is_lost(base: Path, formatted: ChatFormat, rows: list[object]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in rows))
        records, rejects = select(configured(base, path), formatted)
    assert len(records) + len(rejects) == len(rows)
