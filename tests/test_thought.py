"""Thought and answer are told apart alike in whole outputs and in streams cut anywhere."""

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.thought import ParsedOutput, ThoughtParser, parse_output

# name: (output, the prompt opened the thought, what it is)
OUTPUTS = {
    "well formed": ("<think>\nWhy?\n</think>\n\nSo.", False, ParsedOutput("Why?", "So.", True, True)),
    "opened by the prompt": ("Why?\n</think>\n\nSo.", True, ParsedOutput("Why?", "So.", True, True)),
    "opened twice": ("<think>\nWhy?</think>So.", True, ParsedOutput("Why?", "So.", True, True)),
    "opened twice in the output": (
        "<think><think>Why?</think>So.",
        False,
        ParsedOutput("Why?", "So.", True, False),
    ),
    "no thought": (" So. ", False, ParsedOutput(None, "So.", False, False)),
    "never closed": ("<think>Why? And", False, ParsedOutput("Why? And", "", False, False)),
    "never closed, opened by the prompt": ("Why? And", True, ParsedOutput("Why? And", "", False, False)),
    "closed twice": ("<think>Why?</think>So</think>.", False, ParsedOutput("Why?", "So.", True, False)),
    "two thoughts": (
        "<think>a </think> b <think>c</think> d",
        False,
        ParsedOutput("a\n\nc", "b\n\nd", True, False),
    ),
    "answer first": ("So. <think>Why?", False, ParsedOutput("Why?", "So.", False, False)),
    "empty thought": ("<think>\n\n</think>So.", False, ParsedOutput("", "So.", True, False)),
    "empty answer": ("<think>Why?</think>\n", False, ParsedOutput("Why?", "", True, False)),
    "nothing": ("", False, ParsedOutput(None, "", False, False)),
    "nothing in a thought": ("", True, ParsedOutput("", "", False, False)),
    "not quite tags": ("x < y </thin> <th", False, ParsedOutput(None, "x < y </thin> <th", False, False)),
    "a tag inside the beginning of one": (
        "<<think>a<</</think>b",
        False,
        ParsedOutput("a<</", "<\n\nb", True, False),
    ),
    "white space inside": ("<think>a\n b</think>c  d\n", False, ParsedOutput("a\n b", "c  d", True, True)),
}  # fmt: skip


def streamed(pieces: list[str], opens_thought: bool) -> tuple[str, str]:
    parser = ThoughtParser(opens_thought)
    parts = {"thought": "", "answer": ""}
    for piece in pieces:
        for part, text in parser.feed(piece):
            parts[part] += text
    for part, text in parser.finish():
        parts[part] += text
    return parts["thought"], parts["answer"]


@pytest.mark.parametrize(("text", "opens_thought", "expected"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_whole_output(text: str, opens_thought: bool, expected: ParsedOutput) -> None:
    assert parse_output(text, opens_thought) == expected


@pytest.mark.parametrize(("text", "opens_thought", "expected"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_a_stream_cut_anywhere_gives_the_same_parts(text: str, opens_thought: bool, expected: ParsedOutput) -> None:
    wanted = (expected.thought or "", expected.answer)
    assert streamed(list(text), opens_thought) == wanted
    for first, second in combinations(range(len(text) + 1), 2):
        pieces = [text[:first], text[first:second], text[second:]]
        assert streamed(pieces, opens_thought) == wanted, pieces


def test_a_missing_opening_is_known_only_once_the_output_is_whole() -> None:
    text = "Why?</think>So."
    assert parse_output(text, opens_thought=False) == ParsedOutput("Why?", "So.", True, False)
    assert streamed(list(text), opens_thought=False) == ("", "Why?So.")


def test_what_cannot_be_a_tag_is_not_held_back() -> None:
    parser = ThoughtParser(opens_thought=True)
    assert list(parser.feed("Chest pain")) == [("thought", "Chest pain")]
    assert list(parser.feed(" </thi")) == []
    assert list(parser.feed("s")) == [("thought", " </this")]
    assert list(parser.feed("</think>So")) == [("answer", "So")]


FRAGMENTS = [
    "<think>",
    "</think>",
    "<",
    "</",
    "think",
    ">",
    "<thin",
    "k>",
    "a",
    "Uric acid.",
    " ",
    "\n\n",
    "é",
    "🫀",
    "<|im_end|>",
]


@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    opens_thought=st.booleans(),
)
def test_no_text_is_lost_or_told_twice_however_tags_are_broken(
    fragments: list[str], cuts: list[int], opens_thought: bool
) -> None:
    text = "".join(fragments)
    pieces = [text[first:second] for first, second in pairwise([0, *sorted(cuts), len(text)])]
    parser = ThoughtParser(opens_thought)
    told = [event for piece in pieces for event in parser.feed(piece)] + list(parser.finish())
    whole = ThoughtParser(opens_thought)
    at_once = [*whole.feed(text), *whole.finish()]
    for part in ("thought", "answer"):
        assert "".join(piece for p, piece in told if p == part) == "".join(piece for p, piece in at_once if p == part)
    visible = "".join(piece for _, piece in told)
    assert re.sub(r"\s", "", visible) == re.sub(r"\s|</?think>", "", text)
    assert all(piece.strip() for _, piece in told)
