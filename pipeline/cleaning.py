"""Cleaning of one text: what is repaired, and under which name it is counted.

ftfy (https://ftfy.readthedocs.io) does the work, with what would change meaning switched off: compatibility forms
stay, because NFKC turns 10⁻³ into 10-3 and ½ into 1⁄2, and so do curly quotes and full-width characters.
"""

from __future__ import annotations

import re
import unicodedata

import ftfy

_FTFY = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, normalization="NFC")
# ftfy's names of its steps -> ours.
_REPAIRS = {
    "unescape_html": "HTML entities",
    "remove_terminal_escapes": "control characters",
    "remove_control_chars": "control characters",
    "fix_latin_ligatures": "ligatures",
    "fix_line_breaks": "line breaks",
    "fix_surrogates": "surrogates",
    "NFC": "Unicode normal form",
}
MOJIBAKE = "wrongly decoded text"
INVISIBLE = "invisible characters"
# Zero-width space, word joiner, soft hyphen, and the marks that reorder text on screen; joiners that shape emoji and
# Indic or Persian letters (U+200C, U+200D) stay.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\u00ad\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"))
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def clean_text(text: str) -> tuple[str, frozenset[str]]:
    """The repaired text without white space around it, and the names of the repairs that changed it."""
    repaired, steps = ftfy.fix_and_explain(text, config=_FTFY)
    visible = repaired.translate(_INVISIBLE)
    changes = set()
    if repaired != text:
        changes = {_REPAIRS.get(step.parameter, MOJIBAKE) for step in steps or ()}
    if visible != repaired:
        changes.add(INVISIBLE)
        visible = unicodedata.normalize("NFC", visible)  # what stood on both sides may compose now
    return visible.strip(), frozenset(changes)


def sentence_starts(text: str) -> list[int]:
    """Where sentences and paragraphs of a text begin, the first one at 0."""
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text) if match.end() < len(text))]
