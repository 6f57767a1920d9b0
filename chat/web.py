"""The web page: a conversation with one GGUF, or with two side by side.

    with ExitStack() as stack:
        models = [WebModel(path.stem, stack.enter_context(open_model(path, 4096, None))) for path in paths]
        with build_page(models, WebSettings(RedFlagWatch.load())) as page:
            ...

``chat/web_server.py`` serves it. Gradio draws the page and carries its events; what is asked, answered and shown is
decided in ``web_conversation``, ``web_queue`` and ``web_html``, which know nothing of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chat import web_texts
from chat.web_conversation import Controls, Conversation, WebModel, WebSettings, check_number
from chat.web_html import exchange_to_html, spoken_html, system_prompts_to_html
from chat.web_queue import AnswerQueue, Exchange
from pipeline.errors import MedcotError

__all__ = ["STYLE", "THEME", "WebModel", "WebSettings", "build_page"]

SECONDS_BETWEEN_UPDATES = 0.12
MOST_WAITING = 64  # events that Gradio holds; who comes then is told to come back
LENGTH_STEP = 16  # tokens
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 1.0
_FOCUS = "document.querySelector('#question textarea').focus()"
_DATA = Path(__file__).with_name("data")
STYLE = (_DATA / "web.css").read_text(encoding="utf-8")
_SCRIPT = (_DATA / "web.js").read_text(encoding="utf-8")
# System fonts: Gradio's other themes name fonts of Google's.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"],
).set(  # contrast of 4.5 : 1 and more, which Gradio's greys and buttons do not have
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    slider_color="*primary_700",
    slider_color_dark="*primary_400",
)


@dataclass(frozen=True)
class _View:
    """The components that handlers change."""

    state: gr.State
    past: gr.HTML
    current: gr.HTML
    spoken: gr.HTML
    status: gr.HTML
    question: gr.Textbox
    stop: gr.Button
    answer_now: gr.Button

    def outputs(self) -> list[gr.components.Component]:
        return list(vars(self).values())

    def updates(self, **changed: Any) -> list[Any]:
        """One value for each output: those named, and nothing for the others."""
        return [changed.get(name, gr.skip()) for name in vars(self)]


@contextmanager
def build_page(models: Sequence[WebModel], settings: WebSettings) -> Iterator[gr.Blocks]:
    """The page, to be served with ``THEME`` and ``STYLE`` within the context; at its end no model is in use any more.

    Raises MedcotError for more than two models.
    """
    check_number(len(models))
    queue = AnswerQueue()
    try:
        yield _lay_out(models, settings, lambda: Conversation(models, settings, queue))
    finally:
        queue.close()


def _lay_out(models: Sequence[WebModel], settings: WebSettings, begin: Callable[[], Conversation]) -> gr.Blocks:
    names = " and ".join(each.name for each in models)
    with gr.Blocks(title=f"{web_texts.TITLE}: {names}", analytics_enabled=False, fill_width=True) as page:
        state = gr.State(None, delete_callback=_forget)
        gr.HTML(
            f"<h1>{web_texts.TITLE}</h1><p class='models'>{escape(names)}</p>"
            f"<p class='disclaimer' role='note'>{escape(web_texts.PAGE_DISCLAIMER)}</p>"
            + system_prompts_to_html([each.model.chat_format.system for each in models]),
            elem_id="top",
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=320, elem_id="talk"):
                past = gr.HTML("", elem_id="past", js_on_load=_SCRIPT)
                current = gr.HTML("", elem_id="current", js_on_load=_SCRIPT)
                # Apart from what is seen, which changes with every token: a screen reader would begin again each time.
                spoken = gr.HTML(
                    "",
                    elem_id="spoken",
                    html_template='<div class="hidden" role="log" aria-label="The answer as it comes">${value}</div>',
                )
                with gr.Column(elem_id="ask"):
                    status = gr.HTML("", elem_id="status", html_template='<p role="status">${value}</p>')
                    question = gr.Textbox(
                        label="Your question",
                        info=web_texts.QUESTION_HINT,
                        lines=1,
                        max_lines=8,
                        elem_id="question",
                    )
                    with gr.Row(elem_id="buttons"):
                        send = gr.Button("Send", variant="primary", elem_id="send")
                        stop = gr.Button("Stop", interactive=False, elem_id="stop")
                        answer_now = gr.Button("Answer now", interactive=False, elem_id="answer-now")
                        retry = gr.Button("Retry", elem_id="retry")
                        clear = gr.Button("New conversation", elem_id="clear")
            with gr.Column(scale=1, min_width=280, elem_id="side"):
                controls = _lay_out_controls(models, settings)
                _lay_out_examples(question)
        view = _View(state, past, current, spoken, status, question, stop, answer_now)
        _connect(page, view, begin, controls, [send.click, question.submit], retry, clear)
    page.queue(max_size=MOST_WAITING, api_open=False)
    return page


def _lay_out_controls(models: Sequence[WebModel], settings: WebSettings) -> list[gr.Slider]:
    """Temperature, length and thought budget, in the order in which handlers take them."""
    longest = longest_answer(models)
    temperature = settings.sampling(models[0].model, 0).temperature
    budget = longest if settings.thought_budget is None else min(settings.thought_budget, longest)
    with gr.Group(elem_id="controls"):
        return [
            gr.Slider(
                LOWEST_TEMPERATURE,
                HIGHEST_TEMPERATURE,
                value=min(max(temperature, LOWEST_TEMPERATURE), HIGHEST_TEMPERATURE),
                step=0.05,
                label="Temperature",
                info="Low: the same words again; high: other words each time.",
                elem_id="temperature",
            ),
            gr.Slider(
                LENGTH_STEP,
                longest,
                value=min(settings.max_new_tokens, longest),
                step=LENGTH_STEP,
                label="Length",
                info="Tokens of thought and answer together, at most.",
                elem_id="length",
            ),
            gr.Slider(
                0,
                longest,
                value=budget,
                step=LENGTH_STEP,
                label="Thought budget",
                info="Tokens of thought before the model has to answer. 0: no thought; right end: no limit.",
                elem_id="thought-budget",
            ),
        ]


def _lay_out_examples(question: gr.Textbox) -> None:
    gr.HTML("<h2>Example questions</h2>")
    with gr.Column(elem_id="examples"):
        for text in web_texts.EXAMPLES:
            example = gr.Button(text, size="sm")
            example.click(None, outputs=question, js=f"() => {{ {_FOCUS}; return {json.dumps(text)}; }}")


def longest_answer(models: Sequence[WebModel]) -> int:
    """Tokens: half of the smallest context, the other half being the question's."""
    return max(2 * LENGTH_STEP, min(each.model.n_ctx for each in models) // 2 // LENGTH_STEP * LENGTH_STEP)


def _connect(
    page: gr.Blocks,
    view: _View,
    begin: Callable[[], Conversation],
    controls: Sequence[gr.Slider],
    sending: Sequence[Any],
    retry: gr.Button,
    clear: gr.Button,
) -> None:
    """Nothing here is offered to programs: that is what ``medcot serve --api`` is for."""
    longest = controls[1].maximum

    def as_controls(temperature: float, length: float, budget: float) -> Controls:
        return Controls(temperature, int(length), None if budget >= longest else int(budget))

    async def ask(conversation: Conversation | None, question: str, *sliders: float) -> AsyncIterator[list[Any]]:
        conversation = conversation or begin()
        async for update in _follow(view, conversation, lambda: conversation.ask(question, as_controls(*sliders))):
            yield update

    async def ask_again(conversation: Conversation | None, *sliders: float) -> AsyncIterator[list[Any]]:
        conversation = conversation or begin()
        async for update in _follow(view, conversation, lambda: conversation.retry(as_controls(*sliders))):
            yield update

    def start_anew(conversation: Conversation | None) -> list[Any]:
        _forget(conversation)
        return view.updates(state=begin(), past="", current="", spoken="", status=web_texts.CLEARED, **_idle())

    def stop_answer(conversation: Conversation | None) -> None:
        _forget(conversation)

    def hurry(conversation: Conversation | None) -> None:
        if conversation is not None:
            conversation.answer_now()

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    streaming = {**private, "outputs": view.outputs(), "concurrency_limit": None, "trigger_mode": "multiple"}
    at_once = {**private, "inputs": view.state, "queue": False}
    gr.on(sending, ask, inputs=[view.state, view.question, *controls], **streaming)
    retry.click(ask_again, inputs=[view.state, *controls], **streaming)
    clear.click(start_anew, outputs=view.outputs(), **at_once).then(None, js=f"() => {{ {_FOCUS}; }}")
    view.stop.click(stop_answer, **at_once).then(None, js=f"() => {{ {_FOCUS}; }}")
    view.answer_now.click(hurry, **at_once)
    page.load(begin, outputs=view.state, **private)


async def _follow(view: _View, conversation: Conversation, submit: Callable[[], Exchange]) -> AsyncIterator[list[Any]]:
    """Show an exchange until it is finished. Gradio closes this when the browser has gone: then it is stopped."""
    try:
        exchange = await asyncio.to_thread(submit)  # the rules for emergencies read the whole text
    except MedcotError as error:
        yield view.updates(state=conversation, status=escape(str(error)))
        return
    past = "".join(
        exchange_to_html(each, index, is_last=False) for index, each in enumerate(conversation.exchanges[:-1])
    )
    number = len(conversation.exchanges) - 1
    place = None
    try:
        yield view.updates(
            state=conversation, past=past, spoken="", question="", stop=gr.update(interactive=True),
            answer_now=gr.update(interactive=True),
        )  # fmt: skip
        while conversation.last is exchange and not exchange.finished:
            place, before = conversation.place(), place
            yield view.updates(
                current=exchange_to_html(exchange, number),
                spoken=spoken_html(exchange),
                **({} if place == before else {"status": web_texts.waiting(place) if place else ""}),
            )
            await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
    finally:
        conversation.stop(exchange)
    if conversation.last is exchange:
        yield view.updates(
            current=exchange_to_html(exchange, number), spoken=spoken_html(exchange), status="", **_idle()
        )


def _idle() -> dict[str, Any]:
    return {"stop": gr.update(interactive=False), "answer_now": gr.update(interactive=False)}


def _forget(conversation: Conversation | None) -> None:
    if conversation is not None:
        conversation.stop()
