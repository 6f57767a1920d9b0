"""Tokens, chat template and control tokens of a GGUF against those that trained, each with its first difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.verify_probe import Answer, Request, VocabularyView
from pipeline.adapter_recipe import AdapterRecipe
from pipeline.results import Check

_SHOWN_IDS = 8


def vocabulary_checks(
    request: Request, view: VocabularyView, answer: Answer, recipe: AdapterRecipe | None
) -> list[Check]:
    """Everything but weights: ids of texts and of training prompts, template, BOS and EOS; ``view`` is what trained."""
    ours, theirs = view, answer.view
    texts = request.texts
    checks = []
    checks.append(_whole_texts_check(texts, ours, theirs, answer.tokenizer_model == "llama"))
    for name, part in (
        ("texts at the start", "at_start"),
        ("texts after a control token", "after_control"),
        ("texts that go on", "after_text"),
    ):
        checks.append(_ids_check(name, texts, *([getattr(s, part) for s in side.segments] for side in (ours, theirs))))
    checks.append(_recorded_template_check(ours, answer, recipe))
    checks.append(_template_check(request, ours, theirs))
    questions = [each.question for each in request.examples]
    refusal = ours.refusal or theirs.refusal
    checks.append(
        Check(name="token ids: training prompts", passed=False, detail=refusal)
        if refusal
        else _ids_check("training prompts", questions, ours.example_ids, theirs.example_ids)
    )
    checks.append(_special_token_check(ours, theirs, answer.turn_ends_generation))
    return checks


def _whole_texts_check(
    texts: Sequence[str], ours: VocabularyView, theirs: VocabularyView, is_sentencepiece: bool
) -> Check:
    """Texts as llama.cpp's own programs tokenize them, but for what only medcot does as the tokenizer does it.

    That is SentencePiece's space after control tokens, and control tokens that swallow white space
    (``Vocabulary.remarks`` in export/tokenizer_metadata.py); medcot encodes piece by piece (pipeline/prompts.py).
    """
    if is_sentencepiece:
        return Check(name="token ids: whole texts", passed=True, detail="SentencePiece: compared in pieces")
    plain = [index for index, text in enumerate(texts) if not any(token in text for token in ours.strips)]
    check = _ids_check(
        "whole texts",
        [texts[index] for index in plain],
        *([side.whole[index] for index in plain] for side in (ours, theirs)),
    )
    left_out = len(texts) - len(plain)
    if not (check.passed and left_out):
        return check
    why = f"{left_out} texts are left out, in which llama.cpp keeps the white space next to {ours.strips[0]}"
    return check.model_copy(update={"detail": f"{check.detail}; {why}"})


def _ids_check(name: str, texts: Sequence[str], ours: list[list[int]], theirs: list[list[int]]) -> Check:
    for text, expected, found in zip(texts, ours, theirs, strict=True):
        if expected != found:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
            at = min(len(expected), len(found)) if at is None else at
            window = slice(max(0, at - 1), at + _SHOWN_IDS)
            where = f"{text[:60]!r}, from token {window.start} on"
            detail = f"{where}, becomes {found[window]}, in training {expected[window]}"
            return Check(name=f"token ids: {name}", passed=False, detail=detail)
    total = sum(map(len, ours))
    return Check(name=f"token ids: {name}", passed=True, detail=f"{total} ids of {len(texts)} texts are equal")


def _recorded_template_check(ours: VocabularyView, answer: Answer, recipe: AdapterRecipe | None) -> Check:
    """The template in the file, the one it says it was exported with, and the one that trained: one hash."""
    found = answer.view.template_sha256
    trained = recipe.template_sha256 if recipe else ours.template_sha256
    recorded = answer.recorded_template_sha256
    faults = []
    if recorded not in (None, found):
        faults.append(f"it was changed after export, which recorded {recorded:.12}")
    if found != trained:
        faults.append(f"in training it was {trained:.12}")
    # A file without a recorded template is not of medcot's export, and says nothing of the system prompt either.
    unsaid = recorded is None and answer.recorded_system is None
    if recipe and not unsaid and answer.recorded_system != recipe.system:
        faults.append(f"the file's system prompt is {answer.recorded_system!r}, in training {recipe.system!r}")
    in_file = "as the file records" if recorded else "the file records none"
    in_adapter = (
        "as the adapter records" if recipe else "the adapter's folder records none, so its tokenizer's is taken"
    )
    detail = "; ".join(faults) or f"{in_file}; {in_adapter}"
    return Check(name="chat template", passed=not faults, detail=f"sha256 {found:.12}: {detail}")


def _template_check(request: Request, ours: VocabularyView, theirs: VocabularyView) -> Check:
    name = "rendered templates"
    for conversation, expected, found in zip(request.conversations, ours.rendered, theirs.rendered, strict=True):
        if expected != found:
            roles = ", ".join(message["role"] for message in conversation.messages)
            return Check(name=name, passed=False, detail=f"({roles}) {_first_difference(expected, found)}")
    return Check(name=name, passed=True, detail=f"{len(ours.rendered)} conversations are equal")


def _first_difference(expected: str | None, found: str | None) -> str:
    if expected is None or found is None:
        refusing = "training" if expected is None else "the GGUF"
        return f"the template of {refusing} refuses the conversation, the other one does not"
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    at = min(len(expected), len(found)) if at is None else at
    start = max(0, at - 20)
    return f"reads {found[start : at + 40]!r} at character {at}, in training {expected[start : at + 40]!r}"


def _special_token_check(ours: VocabularyView, theirs: VocabularyView, turn_ends_generation: bool) -> Check:
    name = "BOS and EOS"
    for label, get in _SPECIAL_FACTS:
        if get(ours) != get(theirs):
            return Check(name=name, passed=False, detail=f"{label} is {get(theirs)!r}, in training {get(ours)!r}")
    if not turn_ends_generation:
        return Check(name=name, passed=False, detail=f"llama.cpp does not stop at {theirs.end_of_turn!r}")
    added = "added" if theirs.adds_bos else "not added"
    detail = f"BOS {theirs.bos_token!r} is {added}, generation stops at {theirs.end_of_turn!r}"
    return Check(name=name, passed=True, detail=detail)


_SPECIAL_FACTS: tuple[tuple[str, Callable[[VocabularyView], object]], ...] = (
    ("EOS", lambda view: view.eos_token),
    ("the end of turn", lambda view: view.end_of_turn),
    ("the id of EOS", lambda view: view.eos_id),
    ("adding BOS", lambda view: view.adds_bos),
    ("control tokens that swallow white space", lambda view: view.strips),
    ("BOS", lambda view: view.bos_token if view.adds_bos else None),
)
