"""Multiple choice in two ways: which letter is the likeliest after a closed thought, and what the model answers itself.

The options are part of the question, so a record with options is asked a second time. Likelihoods say what the model
holds likely, whatever form its answers take, and give probabilities that can be calibrated; its own answer says what
a person would read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bench.engines import Engine
from bench.held_out import LETTERS, HeldOutRecord
from bench.statistics import Floats
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat, Example
from pipeline.results import CalibrationBin, Measurement
from pipeline.thought import parse_output

BINS = 10
_CUE = "The answer is"
# The letter is upper case even where the words around it need not be: "the answer is a fever" names no option.
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b)(?i:\s+is)?(?i:\s+option)?\s*:?\s*[*(\[\"'“]*([A-Z])(?![\w'’])"
    r"|\\boxed\{(?:\\text\{)?\s*([A-Z])\s*\}"
)
_LABEL = re.compile(r"^[ \t*(\[\"'“]*([A-Z])(?:[.):\]*]|[ \t]*$)", re.MULTILINE)
_WORD = re.compile(r"\w+")


class ChoiceOutcome(Measurement):
    """One model on one record's options, all indices into them."""

    right: int
    log_probabilities: list[float]
    own_thought: bool
    output: str
    extracted: int | None

    @property
    def probabilities(self) -> list[float]:
        """Of the options among each other."""
        likeliest = max(self.log_probabilities)
        weights = np.exp(np.array(self.log_probabilities) - likeliest)
        return [float(weight) for weight in weights / weights.sum()]

    @property
    def likeliest_is_right(self) -> bool:
        """Whether the right option alone is the likeliest: a tie is no answer."""
        others = (value for index, value in enumerate(self.log_probabilities) if index != self.right)
        return self.log_probabilities[self.right] > max(others)

    @property
    def extracted_is_right(self) -> bool:
        return self.extracted == self.right

    @property
    def brier_score(self) -> float:
        """Squared error of all options' probabilities, 0 to 2 (Brier 1950, Monthly Weather Review 78:1)."""
        return sum((p - (index == self.right)) ** 2 for index, p in enumerate(self.probabilities))


def choice_question(record: HeldOutRecord) -> str:
    """The question with its options, as the model is asked."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record.options, strict=False))
    return f"{record.example.question}\n\n{options}\n\nAnswer with the letter of the right option."


def measure_choice(engine: Engine, record: HeldOutRecord, new: Sequence[int]) -> ChoiceOutcome:
    """Score the options; ``new`` is what the model wrote itself when asked ``choice_question``.

    The letter follows the model's own thought where it closed one. Where it did not close its thought, an empty one
    takes its place, and a model that answers without a thought is not made to have one: it would be off its form.
    """
    output = engine.text(new)
    parsed = parse_output(output, engine.chat_format.opens_thought)
    own_thought = parsed.closed and bool(parsed.thought)
    # None becomes an empty thought where the prompt opens one.
    without = None if parsed.thought is None or engine.chat_format.opens_thought else ""
    thought = parsed.thought if own_thought else without
    question = choice_question(record)
    prompt, following = option_tokens(engine.chat_format, question, thought, len(record.options))
    log_probabilities = engine.next_log_probabilities(prompt)
    return ChoiceOutcome(
        right=record.right,
        log_probabilities=[float(log_probabilities[token]) for token in following],
        own_thought=own_thought,
        output=output,
        extracted=extract_option(parsed.answer, record.options),
    )


def option_tokens(
    chat_format: ChatFormat, question: str, thought: str | None, options: int
) -> tuple[list[int], list[int]]:
    """Ids of the conversation up to the answer's letter, and for each letter the id that follows.

    All options share what comes before the letter, so one evaluation gives the likelihood of each. Raises MedcotError
    where two letters begin with the same token.
    """
    letters = LETTERS[:options]
    spelled = [chat_format.encode(Example(question, thought, f"{_CUE} {letter}")).input_ids for letter in letters]
    shared = _common_prefix(spelled)
    following = [ids[shared] for ids in spelled]
    if len(set(following)) < len(following):
        raise MedcotError(
            f"This model's vocabulary has no token of its own for each letter from A to {letters[-1]}, so that options "
            "cannot be scored by their letters: leave multiple choice out (evaluation.choice_rows=0, --choice-rows 0)."
        )
    return spelled[0][:shared], following


def extract_option(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names, None where it names none or several.

    In this order: a letter that it calls the answer, a single line that begins with a letter as a label, the words of
    exactly one option. A letter beside the words of other options only ("A. sodium" where sodium is C) names none.
    """
    letters = LETTERS[: len(options)]
    stated = {letter for pair in _STATED.findall(answer) for letter in pair if letter and letter in letters}
    labels = {letter for letter in _LABEL.findall(answer) if letter in letters}
    named = _options_named(answer, options)
    found = {letters.index(letter) for letter in stated or labels}
    if not found:
        return named.pop() if len(named) == 1 else None
    contradicted = bool(named) and not found <= named
    return found.pop() if len(found) == 1 and not contradicted else None


def calibration_parts(outcomes: Sequence[ChoiceOutcome]) -> Floats:
    """Per record, for each of BINS bins: whether its confidence lies there, that confidence, whether it was right."""
    return binned([(max(outcome.probabilities), outcome.likeliest_is_right) for outcome in outcomes], BINS)


def binned(predictions: Sequence[tuple[float, bool]], bins: int) -> Floats:
    """Parts of ``calibration_error`` for (confidence, right) pairs, shape (records, 3 x bins)."""
    parts = np.zeros((len(predictions), 3, bins))
    for row, (confidence, right) in enumerate(predictions):
        # Bins are open below and closed above, as in Guo et al. 2017.
        index = min(max(int(np.ceil(confidence * bins)) - 1, 0), bins - 1)
        parts[row, :, index] = 1, confidence, right
    return parts.reshape(len(predictions), 3 * bins)


def calibration_error(sums: Floats) -> Floats:
    """Expected calibration error: |confidence - accuracy| of each bin, weighted by its records.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3. Of few records it is biased upwards.
    """
    records, confidence, right = np.split(sums, 3, axis=1)
    error: npt.NDArray[np.float64] = np.abs(confidence - right).sum(axis=1) / records.sum(axis=1)
    return error


def calibration_bins(outcomes: Sequence[ChoiceOutcome]) -> list[CalibrationBin]:
    sums = calibration_parts(outcomes).sum(axis=0).reshape(3, BINS)
    return [
        CalibrationBin(
            low=index / BINS,
            high=(index + 1) / BINS,
            records=int(records),
            confidence=float(confidence / records) if records else None,
            accuracy=float(right / records) if records else None,
        )
        for index, (records, confidence, right) in enumerate(sums.T)
    ]


def _options_named(answer: str, options: Sequence[str]) -> set[int]:
    """Options whose words occur in the answer; the longest first, so that one inside another is not taken for both."""
    text = _words(answer)
    named: set[int] = set()
    for index in sorted(range(len(options)), key=lambda index: -len(options[index])):
        words = _words(options[index])
        if words.strip() and words in text:
            named.add(index)
            text = text.replace(words, "  ")
    return named


def _words(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all sequences begin with."""
    for index, ids in enumerate(zip(*sequences, strict=False)):
        if len(set(ids)) > 1:
            return index
    return min(map(len, sequences))
