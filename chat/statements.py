"""How words are meant: asserted of someone now, or denied, long past, imagined, or asked about in general.

Negation follows NegEx (Chapman et al. 2001, https://doi.org/10.1006/jbin.2001.1029): a negating phrase reaches a few
words forward, further along a list, and never past a contrast or a new subject. What reads "no" inside a red flag
itself ("not breathing", "don't want to live") denies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from chat.phrases import Hit
from chat.plain_words import Break, PlainWords

REACH_OF_NEGATION = 5  # words, as in NegEx


class Statements:
    """Judges words of one text. ``cues`` holds the hits of each list of cues, ``red_flags`` those of all groups."""

    def __init__(self, text: PlainWords, cues: Mapping[str, list[Hit]], red_flags: Iterable[Hit]) -> None:
        self._text = text
        self._cues = cues
        self._stops = self._positions("clause_starts") | self._positions("contrasts")
        # A pattern may name a bare "not" to be near something: that is still the word which denies.
        longer = (hit for hit in red_flags if hit.end - hit.start > 1)
        inside_red_flags = {position for hit in longer for position in range(hit.start, hit.end)}
        self._near_negation_ends = self._negation_ends("negations", inside_red_flags)
        self._listing_negation_ends = self._negation_ends("listing_negations", inside_red_flags)
        self._clauses = self._number_clauses()
        self._past_clauses = self._clauses_with("past") - self._clauses_with("current")
        self._hypothetical = self._sentences_with("hypothetical") - self._sentences_with("current")
        self._questions = self._general_questions()
        self._asserted: dict[int, bool] = {}

    def asserts(self, hit: Hit) -> bool:
        """Whether the text says of someone, here and now, what stands at ``hit``."""
        # The same word begins hits of many phrases.
        if hit.start not in self._asserted:
            self._asserted[hit.start] = self._asserts_at(hit.start)
        return self._asserted[hit.start]

    def is_vignette(self) -> bool:
        """Whether the text is a case from an examination: about a patient of some age, not about the writer."""
        if self._cues["exam_questions"]:
            return True
        told = self._cues["vignette_people"] and self._cues["vignette_events"]
        return bool(told) and not self._cues["first_person"]

    def _asserts_at(self, start: int) -> bool:
        sentence = self._text.sentence_starts[start]
        return not (
            sentence in self._questions
            or sentence in self._hypothetical
            or self._clauses[start] in self._past_clauses
            or self._is_negated(start)
        )

    def _is_negated(self, start: int) -> bool:
        reach = REACH_OF_NEGATION
        in_list = False
        for position in range(start, self._text.sentence_starts[start], -1):
            if position in self._listing_negation_ends or (position in self._near_negation_ends and not in_list):
                return True
            before = self._text.words[position - 1]
            if position - 1 in self._stops or reach == 0:
                return False
            if before in ("or", "nor") or self._text.breaks[position] is Break.PAUSE:
                reach = REACH_OF_NEGATION
                in_list = in_list or self._text.breaks[position] is Break.PAUSE
            reach -= 1
        return False

    def _negation_ends(self, name: str, inside_red_flags: set[int]) -> set[int]:
        excluded = inside_red_flags | self._covered("no_negations")
        # "No, it hurts" answers a question; it denies nothing that follows.
        return {
            hit.end
            for hit in self._cues[name]
            if hit.start not in excluded
            and not (hit.end < len(self._text.words) and self._text.breaks[hit.end] is Break.PAUSE)
        }

    def _number_clauses(self) -> list[int]:
        """For each word the number of its clause: a sentence, cut at contrasts and before a new subject."""
        contrasts = self._positions("contrasts")
        subjects = self._positions("clause_starts")
        introductions = self._positions("introductions")
        numbers: list[int] = []
        number, first = -1, 0
        for position, before in enumerate(self._text.breaks):
            sentence = self._text.sentence_starts[position]
            joined = before is Break.PAUSE or (position > sentence and self._text.words[position - 1] == "and")
            # "When I was twelve, I fainted": the clause that sets the time belongs to the next one.
            introduced = first == sentence and sentence in introductions
            new_subject = position in subjects and joined and not introduced
            if position == sentence or position in contrasts or new_subject:
                number, first = number + 1, position
            numbers.append(number)
        return numbers

    def _general_questions(self) -> set[int]:
        """The sentences that ask for knowledge, unless the rest of the text tells of a person."""
        impersonal = self._covered("impersonal")
        personal = {
            self._text.sentence_starts[hit.start]
            for name in ("personal", "current")
            for hit in self._cues[name]
            if hit.start not in impersonal
        }
        questions = (self._opened_as_question() | self._sentences_with("question_phrases")) - personal
        others_are_personal = bool(personal - questions) and not self._cues["study"]
        return set() if others_are_personal else questions

    def _opened_as_question(self) -> set[int]:
        openings, fillers = self._positions("question_openings"), self._covered("fillers")
        opened: set[int] = set()
        opens_here = True
        for position, sentence in enumerate(self._text.sentence_starts):
            opens_here = opens_here or position == sentence
            if opens_here and position in openings:
                opened.add(sentence)
            opens_here = opens_here and position in fillers and sentence not in opened
        return opened

    def _positions(self, name: str) -> set[int]:
        return {hit.start for hit in self._cues[name]}

    def _covered(self, name: str) -> set[int]:
        return {position for hit in self._cues[name] for position in range(hit.start, hit.end)}

    def _clauses_with(self, name: str) -> set[int]:
        return {self._clauses[hit.start] for hit in self._cues[name]}

    def _sentences_with(self, name: str) -> set[int]:
        return {self._text.sentence_starts[hit.start] for hit in self._cues[name]}
