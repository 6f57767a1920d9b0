"""Markdown that is shown while it is written: every block plain first, and rendered in its place once it is whole.

A block ends at a blank line outside a fence of code, so what has to be redrawn is short and mostly still on the screen;
a block longer than the screen stays plain. Nothing that a model writes is lost or obeyed on the way: its HTML stays
text, its links are no terminal links, and control characters are made visible once more behind the renderer, because
entities such as ``&#27;`` become characters only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from markdown_it import MarkdownIt
from rich.cells import get_character_cell_size
from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment, Segments

_FENCES = ("```", "~~~")


class MarkdownStream:
    """Prints to a terminal that understands cursor movements; ``finish`` renders what is still plain.

    A block is flushed once it is rendered; what is plain as yet is flushed by the caller.
    """

    def __init__(self, console: Console, harmless: Callable[[str], str]) -> None:
        self._console = console
        self._harmless = harmless
        self._parser = MarkdownIt("commonmark", {"html": False}).enable("table")
        self._block = ""
        self._row = self._column = 0  # of the cursor, from where the block begins

    def feed(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            if not self._block and not line.strip():
                continue  # between blocks stands the one blank line that _settle writes
            self._block += line
            self._show(line)
            if self._block.endswith("\n\n") and not self._in_fence():
                self._settle()

    def finish(self) -> None:
        """Render the last block; the cursor is at the start of a line then."""
        if self._block:
            self._settle()

    def _show(self, line: str) -> None:
        shown = self._harmless(line).replace("\t", "    ")
        self._console.file.write(shown)
        width = self._console.width
        for character in shown:
            if character == "\n":
                self._row, self._column = self._row + 1, 0
                continue
            cells = get_character_cell_size(character)
            if self._column + cells > width:  # the terminal has gone on in the next row
                self._row, self._column = self._row + 1, 0
            self._column += cells

    def _settle(self) -> None:
        if self._row < self._console.height - 1:
            up = f"\x1b[{self._row}A" if self._row else ""
            self._console.file.write(f"\r{up}\x1b[J")
            self._console.print(Segments(list(self._rendered())), end="")
        elif self._column:
            self._console.file.write("\n")
        self._console.file.write("\n")
        self._console.file.flush()
        self._block, self._row, self._column = "", 0, 0

    def _rendered(self) -> Iterator[Segment]:
        """The block as Markdown, without the spaces with which rich fills lines up: they would be copied with it."""
        markdown = Markdown("", hyperlinks=False)
        markdown.parsed = self._parser.parse(self._block)
        for line in Segment.split_lines(self._console.render(markdown)):
            text = [Segment(self._harmless(segment.text), segment.style) for segment in line if not segment.is_control]
            while text and not (text[-1].style and text[-1].style.bgcolor):
                last = text.pop()
                if visible := last.text.rstrip():
                    text.append(Segment(visible, last.style))
                    break
            yield from text
            yield Segment.line()

    def _in_fence(self) -> bool:
        return sum(line.lstrip().startswith(_FENCES) for line in self._block.splitlines()) % 2 == 1
