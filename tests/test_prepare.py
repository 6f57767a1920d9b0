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
from pipeline.labels import label_verdict, loss_mask
from pipeline.prepare import load_records, prepare
from pipeline.prompts import ChatFormat, Example
from pipeline.records import usable_record
from pipeline.results import PreparedData
from pipeline.sources import SourceRow
from pipeline.training.rows import encoded_rows
from pipeline.vocabulary import TransformersVocabulary

SHARED = Path("../shared/data")


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
        "options are not letters with texts": json.dumps(row(96, options=[1], answer_idx="A")),
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


@pytest.mark.broad
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the project")
def test_flashcards_are_the_rows_that_datasets_draws(tmp_path: Path) -> None:
    """The earlier project: filter under 5 characters, Dataset.shuffle(seed=42), the first 3,000 and the next 200."""
    from datasets import Dataset

    source = SHARED / "medquad_flashcards.jsonl"
    folder = shared_tokenizer("tinyllama-1.1b-chat")
    overrides = [f"data.source={source}", f"model.base={folder}"]
    result = prepare(load_config("tinyllama-flashcards", overrides), {}, tmp_path)
    cards = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    long_enough = Dataset.from_list([{"number": i} for i, card in enumerate(cards, 1) if kept_by_the_recipe(card)])
    drawn = long_enough.shuffle(seed=42)["number"][:3200]
    numbers = [r["number"] for name in ("train", "eval") for r in load_records(tmp_path / f"{name}.jsonl")]
    assert numbers == drawn
    assert (result.train_rows, result.eval_rows, result.with_reasoning) == (3000, 200, 0)
    assert result.leakage.policy == "keep" and result.leakage.held_out_given_away > 0
    assert result.rejected == len(cards) - len(long_enough)  # too long ones are cut off at 512 tokens
    assert 0 < result.truncated_eval_rows < result.truncated_rows and result.tokens["whole"].maximum == 512


@pytest.mark.broad
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the project")
def test_flashcards_too_long_for_the_context_are_replaced_and_the_order_stays(tmp_path: Path) -> None:
    folder = shared_tokenizer("tinyllama-1.1b-chat")
    source = SHARED / "medquad_flashcards.jsonl"
    overrides = [
        f"data.source={source}",
        f"model.base={folder}",
        "data.train_rows=200",
        "data.limit=500",
        "data.eval_rows=20",
    ]
    numbers = {}
    for limit in (360, 100000):
        settings = [f"model.max_seq_length={limit}", "data.too_long=drop"]
        config = load_config("tinyllama-flashcards", [*overrides, *settings])
        prepare(config, {}, tmp_path / str(limit))
        numbers[limit] = [r["number"] for r in load_records(tmp_path / str(limit) / "train.jsonl")]
    both = set(numbers[360]) & set(numbers[100000])
    assert 150 < len(both) < 200
    assert [n for n in numbers[360] if n in both] == [n for n in numbers[100000] if n in both]


def kept_by_the_recipe(card: dict[str, str]) -> bool:
    return len(card["input"].strip()) >= 5 and len(card["output"].strip()) >= 5


@pytest.mark.broad
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the project")
def test_medical_o1_records_keep_their_order(tmp_path: Path) -> None:
    folder = shared_tokenizer("deepseek-r1-distill-llama-8b")
    source = SHARED / "medical_o1_sample.jsonl"
    overrides = [f"data.source={source}", f"model.base={folder}", "data.train_rows=100", "data.eval_rows=20"]
    result = prepare(load_config("deepseek-r1-8b", overrides), {}, tmp_path)
    assert (result.read, result.train_rows, result.eval_rows) == (150, 100, 20)
    train = [r["number"] for r in load_records(tmp_path / "train.jsonl")]
    assert train == sorted(train) and train[0] == 1
    assert result.with_reasoning == 120 and result.tokens["thought"].median > 100


def test_duplicates_and_leaks_are_dropped_or_counted(base: Path, tmp_path: Path) -> None:
    vignette = " ".join(f"word{i}" for i in range(40))
    rows = [
        *(row(i, Question=f"Case {i}: " + " ".join(f"finding{i}x{j}" for j in range(12))) for i in range(8)),
        row(8, Question=vignette, Response="A"),
        row(9, Question=vignette.replace("word20", "else"), Response="A"),  # nearly the same
        row(10, Question=vignette.upper() + "?", Response="B"),  # the same but for case and punctuation
        row(11, Question="Case 7: " + " ".join(f"finding7x{j}" for j in range(7)) + " and other words, quite a few"),
    ]
    lines = [json.dumps(value) for value in rows]
    # Rows 7 and 11 share half their 8-grams; in file order row 11 and row 9 are the held-out ones.
    overrides = ["data.shuffle=false", "data.leakage_overlap=0.1", "data.near_duplicate_similarity=0.7"]
    (tmp_path / "drop").mkdir(), (tmp_path / "keep").mkdir()
    dropped, out = run(base, tmp_path / "drop", lines, *overrides, "data.eval_rows=1")
    assert dropped.reject_reasons == {
        "duplicate question": 1,
        "near duplicate": 1,
        "gives a held-out record away": 1,
    }
    rejects = {r["number"]: r for r in map(json.loads, (out / "rejects.jsonl").read_text().split("\n")[:-1])}
    assert set(rejects) == {8, 10, 11}
    assert rejects[11]["detail"].endswith(":9") and rejects[10]["detail"].endswith(":9")
    assert dropped.leakage.held_out_given_away == 1 and dropped.leakage.leaking_records == 1
    kept, _ = run(base, tmp_path / "keep", lines, *overrides, "data.duplicates=keep", "data.leakage=keep")
    assert kept.rejected == 0 and kept.read == kept.train_rows + kept.eval_rows == 12
    assert (kept.repeated_questions, kept.near_duplicates) == (1, 1)
    assert kept.leakage.leaking_records >= 1


def test_a_leaking_record_s_place_goes_to_the_next_unused_one(base: Path, tmp_path: Path) -> None:
    questions = [f"Question {i} " + " ".join(f"a{i}b{j}" for j in range(10)) for i in range(8)]
    questions[1] = questions[4] + " indeed"  # row 5 is held out, row 2 gives it away
    lines = [json.dumps(row(i, Question=question)) for i, question in enumerate(questions)]
    overrides = ["data.shuffle=false", "data.train_rows=4", "data.eval_rows=1", "data.duplicates=keep"]
    result, out = run(base, tmp_path, lines, *overrides)
    assert [r["number"] for r in load_records(out / "train.jsonl")] == [1, 3, 4, 6]
    assert (result.unused_rows, result.rejected) == (2, 1)


def test_reasoning_is_cut_at_sentences_and_never_the_answer(base: Path, tmp_path: Path) -> None:
    sentences = [f"Sentence number {i} says a little about it." for i in range(60)]
    long = row(99, Complex_CoT=" ".join(sentences), Response="The whole answer, which stays.")
    hopeless = row(98, Complex_CoT="a " * 2000, Response="Short.")
    lines = [*(json.dumps(row(i)) for i in range(4)), json.dumps(long), json.dumps(hopeless)]
    overrides = ["data.too_long=cut", "model.max_seq_length=300", "data.shuffle=false", "data.eval_rows=1"]
    result, out = run(base, tmp_path, lines, *overrides)
    assert (result.cut_rows, result.reject_reasons) == (1, {"too long": 1})
    cut = next(r for r in load_records(out / "eval.jsonl") if r["number"] == 5)
    assert cut["answer"] == "The whole answer, which stays."
    kept = cut["reasoning"].split("it. ")
    assert cut["reasoning"] == " ".join(sentences[-len(kept) :]) and 1 < len(kept) < 60
    assert 250 < result.tokens["whole"].maximum <= 300


def test_a_record_can_be_cut_off_as_training_cuts_it_off(base: Path, tmp_path: Path) -> None:
    """As ``tokenizer(truncation=True)``: the answer's end and the end of turn go, the text in the file stays whole."""
    long = row(99, Complex_CoT=None, Response="word " * 400)
    hopeless = row(98, Question="word " * 400, Complex_CoT=None)
    lines = [*(json.dumps(row(i, Complex_CoT=None)) for i in range(4)), *map(json.dumps, (long, hopeless))]
    overrides = ["data.too_long=truncate", "model.max_seq_length=128", "data.shuffle=false", "data.eval_rows=1"]
    result, out = run(base, tmp_path, lines, *overrides, "data.columns.reasoning=null")
    assert (result.truncated_rows, result.truncated_eval_rows, result.reject_reasons) == (1, 1, {"too long": 1})
    assert "the prompt has" in json.loads((out / "rejects.jsonl").read_text())["detail"]
    assert result.tokens["whole"].maximum == 128
    [held_out] = load_records(out / "eval.jsonl")
    assert held_out["number"] == 5 and len(held_out["answer"].split()) == 400
    chat_format = load_chat_format(base)
    vocabulary = chat_format.vocabulary
    assert isinstance(vocabulary, TransformersVocabulary)
    example = Example(held_out["question"], None, held_out["answer"])
    rows, counts = encoded_rows(chat_format, out / "eval.jsonl", tmp_path / "rows.arrow", 128)
    whole = chat_format.encode(example)
    assert rows[0]["input_ids"] == whole.input_ids[:128] and rows[0]["labels"] == whole.labels[:128]
    assert counts.longest == 128 and vocabulary.control_tokens["<|im_end|>"] not in rows[0]["labels"]
    prompt, _, answer = chat_format.encode_parts(example, 128)
    assert [*prompt, *answer] == whole.input_ids[:128] and 0 < len(answer) < len(whole.completion_ids)
    verdict, fault = label_verdict(chat_format, vocabulary, [example, Example("Why?", None, "So.")], 128)
    assert fault is None and "1 of them is cut off after 128 tokens, without the end of turn" in verdict
    assert loss_mask(chat_format, vocabulary, example, 128)[-1].text == vocabulary.decode(answer)


def test_repairs_are_made_and_counted(base: Path, tmp_path: Path) -> None:
    dirty = row(7, Question="caf\u0065\u0301\x07 10\u207b\u00b3\u200b?", Response="It\u00e2\u20ac\u2122s \ufb01ne.\r\n")
    lines = [json.dumps(row(i)) for i in range(4)] + [json.dumps(dirty)]
    result, out = run(base, tmp_path, lines, "data.shuffle=false")
    cleaned = next(r for name in ("train", "eval") for r in load_records(out / f"{name}.jsonl") if r["number"] == 5)
    assert cleaned["question"] == "caf\u00e9 10\u207b\u00b3?"
    assert cleaned["answer"] == "It\u2019s fine."
    kinds = {"Unicode normal form", "control characters", "invisible characters", "wrongly decoded text", "ligatures"}
    assert kinds <= set(result.repaired) and set(result.repaired.values()) == {1}


@pytest.mark.parametrize(
    ("options", "answer_idx", "expected"),
    [
        ({"A": "x", "B": "y", "C": None}, "B", ({"A": "x", "B": "y"}, "B")),
        (["x", "y"], 1, ({"A": "x", "B": "y"}, "B")),
        ('["x", "y"]', "A", ({"A": "x", "B": "y"}, "A")),
        ('{"A": "x"}', "A", ({"A": "x"}, "A")),
        ("", None, (None, None)),
        (None, "A", (None, None)),
    ],
)
def test_options_in_the_forms_that_data_sets_have(
    base: Path, formatted: ChatFormat, options: object, answer_idx: object, expected: object
) -> None:
    columns = row(1, options=options, answer_idx=answer_idx)
    record = usable_record(SourceRow("x", 1, columns), configured(base, Path("x")), formatted)
    assert (record.options, record.answer_idx) == expected


def test_interrupted_scratch_is_cleared_and_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "out" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "candidates.jsonl").write_text("left by a killed attempt")
    run(base, tmp_path, [json.dumps(row(i)) for i in range(4)])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.jsonl", "rejects.jsonl", "train.jsonl"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["Question", "Complex_CoT", "Response", "options", "answer_idx"]), JSON_VALUES)
        | JSON_VALUES,
        max_size=4,
    )
)
def test_any_rows_are_used_or_rejected_and_none_is_lost(base: Path, rows: list[object]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        filler = [row(i) for i in range(3)]  # so that two are left for the held-out part
        path.write_text("".join(json.dumps(value) + "\n" for value in [*rows, *filler]))
        result = prepare(configured(base, path), {}, Path(folder) / "out")
        rejects = (Path(folder) / "out" / "rejects.jsonl").read_bytes().count(b"\n")
    assert result.read == len(rows) + 3 == result.train_rows + result.eval_rows + result.unused_rows + rejects
