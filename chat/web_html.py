"""The conversation as HTML: what models write becomes Markdown that can neither run nor fetch anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape

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


def exchange_to_html(exchange: Exchange, number: int, *, is_last: bool = True) -> str:
    """One question with its warning and its answers; ``number`` tells exchanges of a conversation apart.

    Only in the last one a warning is an alert, which a screen reader says at once: it would say old ones again.
    """
    role = ' role="alert"' if is_last else ""
    warning = "" if exchange.warning is None else f'<div class="red-flag"{role}>{_lines(exchange.warning)}</div>'
    answers = "".join(
        _generation_to_html(generation, f"{number}-{exchange.seed}-{index}", role, len(exchange.generations) > 1)
        for index, generation in enumerate(exchange.generations)
    )
    return (
        f'<article class="exchange"><h2 class="question"><span class="hidden">You asked: </span>'
        f"{_lines(exchange.question)}</h2>{warning}"
        f'<div class="answers columns-{len(exchange.generations)}">{answers}</div></article>'
    )


def spoken_html(exchange: Exchange) -> str:
    """What a screen reader is told while the answer comes: whole paragraphs, each once, because none changes later."""
    lines = []
    for generation in exchange.generations:
        if generation.state in ("waiting", "reading"):
            continue
        lines.append(f"{generation.name} is thinking." if generation.thought else f"{generation.name} answers.")
        if generation.thought and generation.answer:
            lines.append(f"Thought for {generation.thought_seconds:.0f} seconds. The answer:")
        paragraphs = generation.answer.split("\n\n")
        lines += paragraphs if generation.finished else paragraphs[:-1]
        if generation.turn is not None:
            lines.append(_ending(generation.turn))
    return "".join(f"<p>{escape(line)}</p>" for line in lines if line)


def system_prompts_to_html(texts: Sequence[str | None]) -> str:
    """What the models are told before every conversation (None: nothing), folded, each text once."""
    return "".join(
        f"<details class='system'><summary>{web_texts.SYSTEM_PROMPT}</summary><p>{escape(text)}</p></details>"
        for text in dict.fromkeys(texts)
        if text is not None
    )


def _generation_to_html(generation: Generation, key: str, role: str, is_named: bool) -> str:
    name = f'<h3 class="model">{escape(generation.name)}</h3>' if is_named else ""
    parts = "".join(_parts(generation, key, role))
    return f'<section class="answer" aria-label="{escape(generation.name)}">{name}{parts}</section>'


def _parts(generation: Generation, key: str, role: str) -> Sequence[str]:
    parts = []
    if generation.forgotten:
        questions = ", ".join(f"“{_shorten(turn.question)}”" for turn in generation.forgotten)
        parts.append(f'<p class="note">Forgotten, because the context is full: {escape(questions)}</p>')
    if generation.thought:
        parts.append(_thought_to_html(generation, key))
    if generation.answer:
        parts.append(f'<div class="said">{markdown_to_html(generation.answer)}</div>')
    if generation.problem is not None:
        parts.append(f'<p class="problem"{role}>{escape(generation.problem)}</p>')
    elif generation.turn is not None:
        parts.append(_figures_to_html(generation.turn))
    else:
        parts.append(f'<p class="note">{escape(_progress(generation))}</p>')
    return parts


def _thought_to_html(generation: Generation, key: str) -> str:
    """Open while the model thinks, folded when it answers; the page's script keeps what the user chose instead."""
    is_open = " open" if generation.state == "thinking" else ""
    words = len(generation.thought.split())
    return (
        f'<details class="thought" data-key="{key}"{is_open}>'
        f"<summary>Thought ({words} {'word' if words == 1 else 'words'}, {generation.thought_seconds:.1f} s)</summary>"
        f"<div>{markdown_to_html(generation.thought)}</div></details>"
    )


def _figures_to_html(turn: Turn) -> str:
    figures = [f"{turn.tokens} tokens in {turn.seconds:.1f} s"]
    if turn.tokens_per_second is not None:
        figures.insert(0, f"<b>{turn.tokens_per_second:.1f} tokens/s</b>")
    if turn.time_to_first_token is not None:
        figures.append(f"first token after {turn.time_to_first_token:.1f} s")
    used = f"{turn.context_tokens} of {turn.context_size} tokens"
    return (
        f'<p class="note">{escape(_ending(turn))}</p>'
        f'<p class="figures">{" · ".join(figures)} · <span class="context">context '
        f'<meter min="0" max="{turn.context_size}" value="{turn.context_tokens}" aria-label="Context in use"></meter> '
        f"{used}</span></p>"
    )


def _ending(turn: Turn) -> str:
    """What is unusual about how a turn ended; nothing where nothing is."""
    told = []
    match turn.thought_closed_by:
        case "budget":
            told.append("The thought was ended by the thought budget.")
        case "user":
            told.append("The thought was ended by “Answer now”.")
        case "loop":
            told.append("The thought was ended because it repeated itself.")
    match turn.finished:
        case "stopped":
            told.append("Stopped.")
        case "looped":
            told.append("Ended because it repeated itself.")
        case "length":
            before = "" if turn.answer else " before the answer"
            told.append(f"Cut off{before} at the length limit: raise the length, or begin a new conversation.")
        case "end" if not turn.answer:
            told.append("The model ended without an answer.")
    return " ".join(told)


def _progress(generation: Generation) -> str:
    match generation.state:
        case "waiting":
            return "Waiting ..."
        case "reading":
            reading = generation.reading
            return "Reading ..." if reading is None else f"Reading: {reading.tokens} of {reading.prompt_tokens} tokens"
        case "thinking":
            return "Thinking ..."
        case _:
            return "Answering ..."


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _shorten(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
