"""The packaged cases: enough, varied, sound in form, and plausible in every number that can be checked."""

import json
import re
from collections import Counter
from itertools import combinations

import pytest

from pipeline.sources import SAMPLE_PATH

ROWS = [json.loads(line) for line in SAMPLE_PATH.read_text(encoding="utf-8").splitlines()]

# Plausible ranges of numbers in a vignette: what a living patient can have (units as written in the cases).
VITAL_SIGNS = {
    r"temperature (?:of |is )?(\d+(?:\.\d+)?) ?(?:°C|degrees C)": (25, 43),
    r"(?:heart|pulse) rate (?:of |is )?(\d+)": (20, 260),
    r"\bpulse (?:of |is )?(\d+)": (20, 260),
    r"respiratory rate (?:of |is )?(\d+)": (4, 80),
    r"oxygen saturation (?:of |is )?(\d+)": (50, 100),
    r"hemoglobin (?:of |is )?(\d+(?:\.\d+)?) g/dL": (2, 24),
    r"potassium (?:of |is )?(\d+(?:\.\d+)?) m": (1.2, 9.5),
    r"(?<!urine )(?<!urinary )sodium (?:of |is )?(\d+) m": (100, 180),
    r"\b(\d+)-year-old": (1, 105),
}
# The first person, a question put to oneself, or the small words people think with.
THINKING_ALOUD = re.compile(r"\b(I|me|my|let's|we|Okay|Hmm|Wait|Right|Well|Alright|So)\b|\?|[:,] (?:so|but|yet) ")
STOP_WORDS = {"been", "could", "does", "from", "have", "more", "most", "than", "that", "their", "then", "there"}
STOP_WORDS |= {"these", "they", "this", "were", "what", "which", "while", "will", "with", "would"}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def content_words(text: str) -> set[str]:
    return {word for word in words(text) if word not in STOP_WORDS and len(word) > 3}


def eight_grams(text: str) -> set[tuple[str, ...]]:
    sequence = words(text)
    return {tuple(sequence[i : i + 8]) for i in range(len(sequence) - 7)}


def test_enough_cases_over_enough_specialties() -> None:
    assert len(ROWS) >= 120
    assert len({row["Specialty"] for row in ROWS}) >= 10
    assert min(Counter(row["Specialty"] for row in ROWS).values()) >= 4
    assert sum("options" in row for row in ROWS) >= 48


def test_every_case_is_marked_as_synthetic_and_not_reviewed() -> None:
    assert {row["Provenance"] for row in ROWS} == {"synthetic, not clinically reviewed"}
    assert len({row["id"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_lengths_and_form(row: dict) -> None:
    assert 20 <= len(row["Question"].split()) <= 80
    assert 80 <= len(row["Complex_CoT"].split()) <= 160
    assert 15 <= len(row["Response"].split()) <= 70
    assert row["Question"].rstrip().endswith("?")
    for key in ("Question", "Complex_CoT", "Response"):
        assert row[key] == row[key].strip() and "\n" not in row[key] and "<" + "think" not in row[key]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_reasoning_uses_the_case_and_leads_to_the_answer(row: dict) -> None:
    thought, answer = row["Complex_CoT"], row["Response"]
    first_sentence = re.split(r"(?<=[a-z])\. ", answer)[0]
    conclusion = " ".join(thought.split()[-60:])
    assert content_words(first_sentence) & content_words(conclusion), "the reasoning does not end at the answer"
    assert len(content_words(row["Question"]) & content_words(thought)) >= 3, "the reasoning ignores the case"
    assert THINKING_ALOUD.search(thought), "not a clinician thinking aloud"


@pytest.mark.parametrize("row", [row for row in ROWS if "options" in row], ids=lambda row: row["id"])
def test_options_have_one_right_answer_that_the_response_names(row: dict) -> None:
    options = row["options"]
    assert sorted(options) == ["A", "B", "C", "D"]
    assert len({text.lower() for text in options.values()}) == 4
    assert options[row["answer_idx"]].lower() in row["Response"].lower()


def test_right_letters_are_spread() -> None:
    counts = Counter(row["answer_idx"] for row in ROWS if "options" in row)
    assert min(counts.values()) >= 0.15 * sum(counts.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_numbers_are_those_of_a_living_patient(row: dict) -> None:
    for pattern, (low, high) in VITAL_SIGNS.items():
        for value in re.findall(pattern, row["Question"], flags=re.IGNORECASE):
            assert low <= float(value) <= high, (pattern, value)
    for systolic, diastolic in re.findall(r"(\d{2,3})/(\d{2,3}) ?mm ?Hg", row["Question"]):
        assert 40 <= int(systolic) <= 280 and int(diastolic) < int(systolic)
    saturation = re.findall(r"satur\w*[^.;]*?(\d+)%", row["Question"])
    assert all(40 <= int(value) <= 100 for value in saturation)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_sex_and_findings_agree(row: dict) -> None:
    question = row["Question"].lower()
    if re.search(r"\b(\d+-year-old|old) (man|boy)\b", question):
        assert not re.search(r"\b(pregnan|uterus|ovar|vagina|menstru|cervix|gravida)", question)
    if re.search(r"\b(\d+-year-old|old) (woman|girl)\b", question):
        assert not re.search(r"\b(prostat|testic|scrot|penile)", question)


def test_no_duplicates_and_no_copied_passages() -> None:
    questions = [" ".join(words(row["Question"])) for row in ROWS]
    assert len(set(questions)) == len(questions)
    grams = [eight_grams(row["Question"]) | eight_grams(row["Complex_CoT"]) for row in ROWS]
    close = [
        (ROWS[i]["id"], ROWS[j]["id"]) for i, j in combinations(range(len(ROWS)), 2) if len(grams[i] & grams[j]) > 2
    ]
    assert close == []


def test_openings_vary() -> None:
    openings = Counter(" ".join(row["Complex_CoT"].split()[:2]) for row in ROWS)
    assert max(openings.values()) <= 0.08 * len(ROWS)
