"""Red flags: found in plain language, not in denials, memories, questions and stories; editable; fast; shown first."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_models import ScriptedModel
from red_flag_accuracy import SETS, alarms, by_sentence, judge, print_table, read_sentences

from chat import terminal
from chat.disclaimer import DISCLAIMER, FULL_DISCLAIMER, disclaimer_to_show
from chat.emergency_numbers import numbers_for
from chat.plain_words import split_words
from chat.red_flag_rules import PACKAGED_RULES
from chat.safety import find_red_flags, load_rules, warning
from pipeline.errors import MedcotError

RULES = load_rules()
IDS = [group.id for group in RULES.groups]


def flagged(text: str) -> list[str]:
    """The groups that alarm."""
    return [flag.id for flag in find_red_flags(text, RULES) if flag.form == "alarm"]


def test_there_are_enough_sentences_and_no_set_holds_one_of_another() -> None:
    sets = [read_sentences(name) for name in SETS]
    texts = [sentence.text.casefold() for sentences in sets for sentence in sentences]
    assert len(texts) == len(set(texts)) >= 260
    for sentences in sets:
        assert {"patient", "negated", "history", "question", "hypothetical", "near-miss", "vignette"} == {
            sentence.kind for sentence in sentences
        }
        assert {group for sentence in sentences for group in sentence.expected | sentence.allowed} <= set(IDS)
        assert len({group for sentence in sentences for group in sentence.expected}) >= 15


@pytest.mark.parametrize(
    ("name", "precision", "recall"), [("tuning", 0.97, 0.97), ("held_out", 0.94, 0.94), ("unseen", 0.75, 0.40)]
)
def test_accuracy(name: str, precision: float, recall: float) -> None:
    """A little below what was measured, so that a rule which breaks others is seen; not what would be good enough."""
    judged = judge(name)
    print_table(name, judged)
    accuracy = by_sentence(judged)
    assert accuracy.precision >= precision and accuracy.recall >= recall
    vignettes = [each for each in judged if each.sentence.kind == "vignette"]
    assert all(each.flags and not alarms(each) for each in vignettes)


@pytest.mark.parametrize(
    "text",
    [
        "I CAN'T BREATHE",
        "i cant breathe",
        "I can’t breathe",
        "I can`t breeeathe!!!",
        "I cannot breathe",
        "I can\u2019t\u00a0bre\u00adathe",
        "I c\u200ban't breathe",
        "ｉ ｃａｎ＇ｔ ｂｒｅａｔｈｅ",
        "I can't\nbreathe",
        "i can't bréathe",
        "𝐈 𝐜𝐚𝐧𝐭 𝐛𝐫𝐞𝐚𝐭𝐡𝐞",
    ],
)
def test_the_way_it_is_typed_makes_no_difference(text: str) -> None:
    assert "breathing" in flagged(text)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("I don't know what to do, my chest hurts", "heart-attack"),
        ("I dont know what to do my chest hurts", "heart-attack"),
        ("not breathing", "breathing"),
        ("I don't want to live any more", "suicide"),
        ("can't stop bleeding", "bleeding"),
        ("No, my chest hurts", "heart-attack"),
        ("no fever but crushing chest pain", "heart-attack"),
        ("He's not responding, crushing chest pain before", "heart-attack"),
        ("I had a stroke in 2010. My chest hurts.", "heart-attack"),
        ("I'm pregnant. Everything was fine until today. Now I'm bleeding.", "pregnancy"),
        ("What are the signs of a stroke? My dad's face is drooping.", "stroke"),
        ("My chest feels odd. What does severe chest pain mean?", "heart-attack"),
        ("How many pills would it take to die", "suicide"),
    ],
)
def test_negations_and_questions_do_not_hide_an_emergency(text: str, group: str) -> None:
    assert group in flagged(text)


@pytest.mark.parametrize(
    "text",
    [
        "no chest pain",
        "He denies chest pain, shortness of breath, and has a cold",
        "What are the signs of a stroke?",
        "My father had a stroke in 1990",
        "When I was twelve, I fainted at school",
        "without fever, cough, chest pain or vomiting",
        "",
        "   \n\t",
        "🫀",
        "'''",
    ],
)
def test_denials_questions_and_memories_raise_no_alarm(text: str) -> None:
    assert flagged(text) == []


def test_a_case_from_an_examination_gets_a_reminder_and_the_same_case_at_home_an_alarm() -> None:
    case = "A 45-year-old man presents with crushing chest pain and sweating. What is the diagnosis?"
    told = warning(find_red_flags(case, RULES), RULES, numbers_for(RULES, country="GB"))
    assert told is not None and "\n" not in told and "999" in told
    assert flagged(case) == []
    assert "heart-attack" in flagged(case + " He is my neighbour and I am with him.")


def test_a_flag_quotes_what_was_written() -> None:
    (flag,) = find_red_flags("Hello!  My CHEST\nreally hurts, why?", RULES)
    assert (flag.id, flag.quote, flag.form) == ("heart-attack", "CHEST really hurts", "alarm")


def test_flags_come_once_and_in_the_order_of_the_rules() -> None:
    found = flagged("I can't breathe. My chest hurts. I can't breathe! My chest hurts!")
    assert found == ["heart-attack", "breathing"]


def test_a_long_text_takes_linear_time() -> None:
    """Words of the rules in random order are the worst case: every one of them begins phrases."""
    words = ["chest", "pain", "no", "not", "sudden", "severe", "blood", "can't", "stop", "breathing", "I", "and", "is"]
    chooser = random.Random(0)
    text = " ".join(chooser.choice(words) for _ in range(6_000))
    short, long = (min(_cpu_seconds(text[: len(text) // part]) for _ in range(2)) for part in (4, 1))
    assert long < 2 * 4 * short, "quadratic would be sixteen times as long"


@pytest.mark.parametrize("unit", ["a", "a'", "9", "\u200b", ". ", "(", "incomprehensibilities "])
def test_a_megabyte_is_searched(unit: str) -> None:
    """A pattern that goes back over the text it has read would take hours for one of these."""
    assert "heart-attack" in flagged(unit * (1_000_000 // len(unit)) + ".\n\nMy chest hurts")


def _cpu_seconds(text: str) -> float:
    started = time.process_time()
    find_red_flags(text, RULES)
    return time.process_time() - started


def test_every_random_text_is_read() -> None:
    chooser = random.Random(1)
    for _ in range(100):
        text = "".join(chr(chooser.choice((chooser.randrange(0x250), chooser.randrange(0x10FFFF)))) for _ in range(60))
        words = split_words(text)
        assert len(words.words) == len(words.spans) == len(words.breaks)
        find_red_flags(text + " chest pain", RULES)


# --- the file


def test_every_group_of_the_packaged_rules_says_whom_to_call() -> None:
    assert len(RULES.groups) >= 15
    assert "NOT reviewed" in RULES.review
    assert all("{emergency_number}" in group.message for group in RULES.groups)
    assert "{crisis_line}" in next(group.message for group in RULES.groups if group.id == "suicide")


def changed_rules(folder: Path, old: str, new: str) -> Path:
    text = PACKAGED_RULES.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path = folder / "rules.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_clinicians_new_rule_is_used(tmp_path: Path) -> None:
    path = changed_rules(
        tmp_path, "groups:\n", "groups:\n  - {id: scurvy, title: S, message: M, any_of: [gums ... fell out]}\n"
    )
    assert [flag.id for flag in find_red_flags("My gums just fell out", load_rules(path))] == ["scurvy"]
    assert "scurvy" not in flagged("My gums just fell out")


@pytest.mark.parametrize(
    ("old", "new", "key", "complaint"),
    [
        ("title: Possible stroke", "title: Possible stroke\n    titel: x", "groups.2.titel", "unknown key"),
        ("title: Possible stroke", "title: 5", "groups.2.title", "quotes"),
        ("- slur*|slurred|garbled", "- slur*|<no_such>", "groups.2.any_of.7", "no word"),
        ("- slur*|slurred|garbled", "- <no_such>", "groups.2.any_of.7", "no list <no_such>"),
        ("- slur*|slurred|garbled", "- slur* ...", "groups.2.any_of.7", "at its end"),
        ("- slur*|slurred|garbled", "- ... slur*", "groups.2.any_of.7", "between two words"),
        ("- slur*|slurred|garbled", "- slur* + ", "groups.2.any_of.7", "no word"),
        ("- slur*|slurred|garbled", "- slurred| garbled", "groups.2.any_of.7", "before or after a |"),
        ("  - id: stroke", "  - id: heart-attack", "groups.2.id", "another group"),
        ("pain: [pain, pains", "pain: [pain..., pains", "lists.pain.1", "no word"),
        ('listing_negations: ["no"', "listing_negations: [no", "cues.listing_negations.1", "quotes"),
        ('emergency_number: "000"', "emergency_number: 000", "numbers_by_country.AU.emergency_number", "quotes"),
        ("Call {emergency_number} now and say so", "Call {number}", "groups.1.message", "no {number}"),
        ("Call {emergency_number} now and say so", "Call {now", "groups.1.message", "expected '}'"),
        ("lists:\n", "lists:\n  pain: [ouch]\n", "lists.pain", "written twice"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_line_and_key(
    tmp_path: Path, old: str, new: str, key: str, complaint: str
) -> None:
    path = changed_rules(tmp_path, old, new)
    with pytest.raises(MedcotError) as raised:
        load_rules(path)
    found = re.fullmatch(rf"{re.escape(str(path))}:(\d+): {re.escape(key)}: (.*)", str(raised.value))
    assert found is not None, str(raised.value)
    assert complaint in found[2]
    unchanged = PACKAGED_RULES.read_text(encoding="utf-8")
    line = unchanged[: unchanged.index(old)].count("\n") + 1
    assert abs(int(found[1]) - line) <= 4  # a message's key stands above its text, "written twice" below the first


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = changed_rules(tmp_path, "- slur*|slurred|garbled", "- <none>\n      - $$$")
    with pytest.raises(MedcotError, match=r"<none>.*; .*'\$\$\$'"):
        load_rules(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"groups: [", b"\xff\xfe", b"a: &a [*a]", b"{[]: 1}", b"groups: !!int x"]
)
def test_a_file_that_holds_no_rules_ends_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rules.yaml"
    path.write_bytes(content)
    with pytest.raises(MedcotError, match=r"rules\.yaml"):
        load_rules(path)


def test_an_absent_file_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="cannot be read"):
        load_rules(tmp_path / "absent.yaml")


# --- numbers


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"LANG": "en_US.UTF-8"}, "911"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "en_GB"}, "999"),
        ({"LANG": "C.UTF-8"}, "112"),
        ({}, "112"),
        ({"LANG": "xx_ZZ"}, "112"),
        ({"LANG": "en_US.UTF-8", "MEDCOT_COUNTRY": "au"}, "000"),
        ({"LANG": "en_US.UTF-8", "MEDCOT_EMERGENCY_NUMBER": "1300 555"}, "1300 555"),
    ],
)
def test_the_emergency_number_is_the_users_countrys(environment: dict[str, str], number: str) -> None:
    assert numbers_for(RULES, environment=environment).emergency_number == number


def test_what_the_user_says_goes_before_the_environment() -> None:
    environment = {"MEDCOT_EMERGENCY_NUMBER": "1", "MEDCOT_COUNTRY": "AU"}
    numbers = numbers_for(RULES, "+49 112", "US", environment)
    assert (numbers.emergency_number, numbers.crisis_line) == ("+49 112", "988 (call or text)")


def test_the_warning_of_a_crisis_names_the_crisis_line() -> None:
    told = warning(find_red_flags("I want to die", RULES), RULES, numbers_for(RULES, country="GB"))
    assert told is not None and "116 123" in told and "999" in told and "NOT reviewed" in told and "{" not in told


@pytest.mark.parametrize("number", ["call mum", "911; rm", "1" * 40, "\x1b[2J"])
def test_a_number_that_cannot_be_dialled_is_refused(number: str) -> None:
    with pytest.raises(MedcotError, match="no telephone number"):
        numbers_for(RULES, number)


def test_an_unknown_country_is_refused() -> None:
    with pytest.raises(MedcotError, match=r"AT, AU, .*--emergency-number"):
        numbers_for(RULES, country="Atlantis")


# --- the disclaimer


def test_the_disclaimer_is_shown_in_full_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert disclaimer_to_show() == (FULL_DISCLAIMER, None)
    assert disclaimer_to_show() == (DISCLAIMER, None)
    (state,) = (tmp_path / "state" / "medcot").iterdir()
    state.write_bytes(b"\xffof an older text")
    assert disclaimer_to_show() == (FULL_DISCLAIMER, None)


def test_a_state_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        text, problem = disclaimer_to_show()
        assert text == FULL_DISCLAIMER
        assert problem is not None and "shown again" in problem


# --- in the terminal


def use(monkeypatch: pytest.MonkeyPatch, model: ScriptedModel) -> None:
    @contextmanager
    def open_model(*_: object) -> Iterator[ScriptedModel]:
        yield model

    monkeypatch.setattr(terminal, "open_model", open_model)


def test_a_warning_stands_above_the_answer_also_when_the_model_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MedcotError):
        terminal.run_chat(Path("absent.gguf"), "I can't breathe", emergency_number="123")
    assert "Call 123 now" in capsys.readouterr().err
    use(monkeypatch, ScriptedModel(["Drink tea."]))
    terminal.run_chat(Path("model.gguf"), "I can't breathe \x1b[2J", emergency_number="123")
    out, err = capsys.readouterr()
    assert out == "Drink tea.\n"
    assert "Call 123 now" in err and "\x1b" not in err


def test_no_warning_without_a_red_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, ScriptedModel(["Sleep more."]))
    terminal.run_chat(Path("model.gguf"), "I am a bit tired", emergency_number="123")
    assert "123" not in capsys.readouterr().err


def test_in_a_conversation_the_warning_comes_before_the_model_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_before: list[str] = []

    class Watched(ScriptedModel):
        def generate(self, *arguments: Any, **sampling: Any) -> Iterator[int]:
            printed_before.append(capsys.readouterr().err)
            yield from super().generate(*arguments, **sampling)

    lines = iter(["My face is drooping", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    monkeypatch.setattr(terminal, "_piped_question", lambda: None)
    use(monkeypatch, Watched(["Relax."]))
    terminal.run_chat(Path("model.gguf"), None, emergency_number="123")
    assert "POSSIBLE STROKE" in printed_before[0] and "123" in printed_before[0]


def test_own_rules_replace_the_packaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(PACKAGED_RULES.read_text(encoding="utf-8"))
    values["groups"] = [{"id": "tea", "title": "Tea", "message": "No tea!", "any_of": ["tea"]}]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    use(monkeypatch, ScriptedModel(["Yes."]))
    terminal.run_chat(Path("model.gguf"), "I drink tea and can't breathe", red_flags=path)
    err = capsys.readouterr().err
    assert "No tea!" in err and "BREATHING" not in err
