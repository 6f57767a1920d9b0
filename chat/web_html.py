"""The conversation as HTML: what models write becomes Markdown that can neither run nor fetch anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from itertools import pairwise

from markdown_it import MarkdownIt

from chat import web_texts
from chat.session import Turn
from chat.web_queue import Exchange, Generation

_DEEPEST_HEADING = 6
_HEADING_OFFSET = 3  # h1 is the page's title, h2 a question, h3 a model's name


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables; HTML is escaped, and links and images stay the text that was written.

    A model's link is often invented, and an image would be fetched from wherever the model says.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return parser.disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])


def markdown_to_html(text: str) -> str:
    """HTML of text that a model wrote, with no tag and no attribute but those of Markdown's own."""
    parser = _markdown()
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            level = min(int(token.tag[1:]) + _HEADING_OFFSET, _DEEPEST_HEADING)
            token.tag = f"h{level}"
    return str(parser.renderer.render(tokens, parser.options, {}))


def exchange_to_html(exchange: Exchange, number: int) -> str:
    """One question with its warning and its answers; ``number`` tells exchanges of a conversation apart."""
    warning = "" if exchange.warning is None else _warning_to_html(exchange.warning)
    answers = "".join(
        _generation_to_html(generation, f"{number}-{index}", len(exchange.generations) > 1)
        for index, generation in enumerate(exchange.generations)
    )
    return (
        f'<article class="exchange"><h2 class="question"><span class="hidden">You asked: </span>'
        f"{_lines(exchange.question)}</h2>{warning}"
        f'<div class="answers columns-{len(exchange.generations)}">{answers}</div></article>'
    )


def spoken_html(exchange: Exchange) -> str:
    """What a screen reader is told while the answer comes: whole paragraphs, each once, because none changes later."""
    lines = [exchange.warning] if exchange.warning else []
    for generation in exchange.generations:
        if generation.state in ("waiting", "reading"):
            continue
        lines.append(f"{generation.name} is thinking." if generation.thought else f"{generation.name} answers.")
        if generation.thought and generation.answer:
            lines.append(f"Thought for {generation.thought_seconds:.0f} seconds. The answer:")
        paragraphs = generation.answer.split("\n\n")
        lines += paragraphs if generation.finished else paragraphs[:-1]
        if generation.problem is not None:
            lines.append(generation.problem)
        if generation.turn is not None:
            lines.append(_ending(generation.turn))
    return "".join(f"<p>{escape(line)}</p>" for line in lines if line)


def _generation_to_html(generation: Generation, key: str, is_named: bool) -> str:
    name = f'<h3 class="model">{escape(generation.name)}</h3>' if is_named else ""
    return f'<section class="answer" aria-label="{escape(generation.name)}">{name}{"".join(_parts(generation, key))}</section>'


def _parts(generation: Generation, key: str) -> Sequence[str]:
    parts = []
    if generation.forgotten:
        questions = ", ".join(f"“{_shorten(turn.question)}”" for turn in generation.forgotten)
        parts.append(f'<p class="note">Forgotten, because the context is full: {escape(questions)}</p>')
    if generation.thought:
        parts.append(_thought_to_html(generation, key))
    if generation.answer:
        parts.append(f'<div class="said">{markdown_to_html(generation.answer)}</div>')
    if generation.problem is not None:
        parts.append(f'<p class="problem" role="alert">{escape(generation.problem)}</p>')
    elif generation.turn is not None:
        parts.append(_figures_to_html(generation.turn))
    else:
        parts.append(f'<p class="note">{escape(_progress(generation))}</p>')
    return parts
