"""Near duplicates and leakage against their definitions, written out with Python's sets."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.overlap import HeldOutGrams, NearDuplicates, ngrams, shingles, similarity, text_key, word_hashes


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    length = min(length, len(words))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)} if words else set()


VOCABULARY = ["fever", "cough", "rash", "pain", "in", "the", "of", "a", "Metformin", "250", "mg"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=40).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(a=WORDS, b=WORDS)
def test_similarity_is_the_jaccard_index_of_word_triples(a: str, b: str) -> None:
    first, second = runs(a, 3), runs(b, 3)
    expected = len(first & second) / max(1, len(first | second))
    assert similarity(shingles(a), shingles(b)) == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(held_out=st.lists(WORDS, min_size=1, max_size=4), text=WORDS)
def test_leakage_is_the_share_of_a_held_out_text_s_8_grams(held_out: list[str], text: str) -> None:
    owners, shares = HeldOutGrams(held_out).shares(text)
    found = dict(zip(map(int, owners), shares, strict=True))
    for number, other in enumerate(held_out):
        expected = len(runs(other, 8) & runs(text, 8)) / max(1, len(runs(other, 8)))
        assert found.get(number, 0.0) == pytest.approx(expected)


def test_case_punctuation_and_white_space_are_set_aside_but_not_order() -> None:
    assert text_key("What is  sepsis?") == text_key("what IS sepsis")
    assert text_key("what is sepsis") != text_key("is what sepsis")
    assert len(ngrams(word_hashes("a b c d e f g h i"), 8)) == 2


def test_chinese_is_compared_by_character() -> None:
    assert len(word_hashes("患者发热三天")) == 6


def test_near_duplicates_are_found_among_many_and_others_are_not(tmp_path: Path) -> None:
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = [" ".join(draw.choices(vocabulary, k=60)) for _ in range(400)]
    for number in range(0, 100, 5):  # every fifth of the first hundred comes again with one word changed
        words = texts[number].split()
        words[draw.randrange(60)] = "changed"
        texts.append(" ".join(words))
    near = NearDuplicates(tmp_path)
    for text in texts:
        near.add(text)
    found = near.find(0.8, np.zeros(len(texts), dtype=np.bool_), texts.__getitem__)
    near.close()
    assert found == {400 + i: 5 * i for i in range(20)}


def test_texts_without_words_are_no_duplicates(tmp_path: Path) -> None:
    near = NearDuplicates(tmp_path)
    for _ in range(3):
        near.add("?!")
    assert near.find(0.8, np.zeros(3, dtype=np.bool_), lambda number: "?!") == {}
    near.close()
