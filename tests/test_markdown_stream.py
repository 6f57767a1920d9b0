"""Markdown in a terminal: streamed plain, redrawn rendered, with nothing lost and nothing obeyed.

What a terminal shows is computed by a small terminal of the test's own: rows, wrapping, and the two sequences used.
"""

from __future__ import annotations

import io
import re
import unicodedata

import pytest
from rich.console import Console

from chat.display import harmless
from chat.markdown_stream import MarkdownStream

WIDTH, HEIGHT = 40, 12
FILLER = "\0"  # the second half of a wide character
TEXT = """\
## Treatment

Give **colchicine** 0.5 mg, then `allopurinol` once the attack, which is long described in enough words, is over.

1. rest
2. ice

| drug | dose |
| --- | --- |
| colchicine | 0.5 mg |

```
a  b

c
```

The end."""


def screen(printed: str) -> list[str]:
    """The rows of a terminal WIDTH wide that is as tall as need be."""
    rows, row, column = [""], 0, 0
    for sequence, character in re.findall(r"(\x1b\[[0-9;]*[A-Za-z])|(.)", printed, re.DOTALL):
        if sequence.endswith("A"):
            row -= int(sequence[2:-1])
            assert row >= 0
        elif sequence == "\x1b[J":
            assert column == 0
            del rows[row:]
            rows.append("")
        elif sequence:
            assert sequence.endswith("m"), sequence
        elif character == "\n":
            row, column = row + 1, 0
        elif character == "\r":
            column = 0
        else:
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if column + cells > WIDTH:
                row, column = row + 1, 0
            while len(rows) <= row:
                rows.append("")
            rows[row] = rows[row].ljust(column)[:column] + character.ljust(cells, FILLER)
            column += cells
        while len(rows) <= row:
            rows.append("")
    return [line.replace(FILLER, "").rstrip() for line in rows]


def shown(pieces: list[str], height: int = HEIGHT) -> tuple[str, list[str]]:
    out = io.StringIO()
    stream = MarkdownStream(Console(file=out, force_terminal=True, width=WIDTH, height=height), harmless)
    out.write("before\n")
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return out.getvalue(), screen(out.getvalue())


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_pieces_of_any_size_leave_the_same_rendered_text(size: int) -> None:
    printed, rows = shown([TEXT[at : at + size] for at in range(0, len(TEXT), size)])
    assert rows[0] == "before"
    text = "\n".join(rows)
    assert not re.search(r"[*`#|]|---", text)
    assert "\x1b[1mcolchicine\x1b[0m" in printed
    words = re.sub(r"[*`#|]|---|\n", " ", TEXT).split()
    numbered = [word.rstrip(".") if re.fullmatch(r"\d\.", word) else word for word in words]
    assert re.sub(r"[─━]", " ", text).split() == ["before", *numbered]
    assert rows[-3:] == ["The end.", "", ""]


def test_a_block_longer_than_the_screen_stays_as_it_came() -> None:
    long = "**word** " * 80
    _, rows = shown([long, "\n\n", "**short**"], height=5)
    assert "**word**" in rows[3] and "short" in rows and "**short**" not in rows


@pytest.mark.parametrize(
    "text",
    [
        "take <drug name> daily",
        "<b>5</b> <!-- 10 --> mg",
        "<5 mmol/L and >3",
        "[label](https://example.org/x)",
        "a_b_c ~~x~~ 5 * 3 * 2",
    ],
)
def test_nothing_that_is_no_markdown_is_lost(text: str) -> None:
    _, rows = shown([text])
    seen = " ".join(rows)
    for word in re.findall(r"[A-Za-z0-9./:<>!]+", text):
        assert word in seen, (word, seen)


@pytest.mark.parametrize(
    "text",
    ["\x1b[31mred", "&#27;[2J", "&#x9b;2J", "&#155;2J", "[x](\x1b]52;c;eA==\x07)", "`\x1b[2J`", "x\ry", "\x9b2J"],
)
def test_nothing_is_obeyed(text: str) -> None:
    printed, _ = shown([text + " **b**"])
    ours = re.sub(r"\x1b\[(\d+(;\d+)*)?[mAJ]", "", printed).replace("\r\x1b", "").replace("\r", "", 1)
    assert not set(ours) & {"\x1b", "\x9b", "\x07", "\r"}
    assert "\x1b[2J" not in printed and "\x1b[31m" not in printed and "\x1b]" not in printed


def test_wide_characters_and_tabs_are_counted_as_they_are_shown() -> None:
    _, rows = shown(["心臓の検査\t" * 9, "\n\nend"])
    assert rows[0] == "before" and rows[-3:] == ["end", "", ""]
