"""What models write, as HTML: Markdown and nothing else, folded when it should be, and told to a screen reader once."""

import re
from html.parser import HTMLParser

import pytest
from chat_models import ScriptedModel
from hypothesis import given
from hypothesis import strategies as st

from chat.session import Sampling, Session
from chat.web_html import exchange_to_html, markdown_to_html, spoken_html, system_prompts_to_html
from chat.web_queue import Exchange, Generation

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)
TAGS = {
    "p", "em", "strong", "s", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "hr", "br", "table",
    "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
ATTRIBUTES = {"start", "class", "style"}  # of a list, of a code block's language, of a table cell's alignment
PIECES = [
    "<script>", "<img src=x onerror=y>", "![a](http://b)", "[a](javascript:b)", "<http://a>", "`", '```x" y=z\n',
    "\n\n", "# ", "- ", "1. ", "> ", "|a|b|\n|-|:-:|\n", "**", "&lt;script&gt;", "[a]: http://b\n", "x", " ",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.values.extend(value or "" for _, value in attrs)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_nothing_that_a_model_writes_becomes_more_than_markdown(text: str) -> None:
    found = Tags(markdown_to_html(text))
    assert found.tags <= TAGS and found.attributes <= ATTRIBUTES
    assert not any("url" in value and "(" in value for value in found.values)


def test_markdown_is_rendered_and_links_stay_text() -> None:
    html = markdown_to_html("# A\n\n**b** *c*\n\n- d\n\n|e|\n|-|\n|f|\n\n[g](http://h) ![i](http://j)\n\n[k]: http://l")
    for part in ("<h4>A</h4>", "<strong>b</strong>", "<em>c</em>", "<li>d</li>", "<td>f</td>"):
        assert part in html
    for part in ("[g](http://h)", "![i](http://j)", "[k]: http://l"):
        assert part in html


def generation(output: str, events: int | None = None, **session: object) -> Generation:
    """One that has taken so many events, or all."""
    made = Session(ScriptedModel([output]), GREEDY, **session)  # type: ignore[arg-type]
    result = Generation("m<1>", made, lambda: made.ask("q"))
    if events is None:
        result.run()
        return result
    stream = made.ask("q")
    for _ in range(events):
        result._take(next(stream))
    return result


def shown(*generations: Generation, warning: str | None = None) -> str:
    return exchange_to_html(Exchange("A <b>?", 0, warning, generations), 3)


def test_the_thought_is_open_while_the_model_thinks_and_folded_then() -> None:
    output = "<think>One two three.</think>So it is."
    thinking = shown(generation(output, 5))
    assert '<details class="thought" data-key="3-0-0" open>' in thinking and "Thinking ..." in thinking
    answering = shown(generation(output, len(output) - 18))
    assert '<details class="thought" data-key="3-0-0">' in answering and "Answering ..." in answering
    done = shown(generation(output))
    assert '<details class="thought" data-key="3-0-0">' in done
    assert re.search(r"<summary>Thought \(3 words, \d\.\d s\)</summary>", done)


def test_the_warning_stands_before_every_answer_and_nothing_is_trusted() -> None:
    html = shown(generation("<u>So.", None), warning="Call <112>\nnow")
    assert html.index('role="alert">Call &lt;112&gt;<br>now') < html.index('class="answers')
    assert "A &lt;b&gt;?" in html and "m&lt;1&gt;" in html and "&lt;u&gt;So." in html


def test_only_the_last_warning_is_said_at_once() -> None:
    failed = generation("x")
    failed._fail("Shorten it.")
    exchange = Exchange("q", 0, "Call 112", [failed])
    assert exchange_to_html(exchange, 0).count('role="alert"') == 2
    before = exchange_to_html(exchange, 0, is_last=False)
    assert 'role="alert"' not in before and "Call 112" in before and "Shorten it." in before


def test_two_answers_bear_their_models_names() -> None:
    assert '<h3 class="model">' not in shown(generation("So."))
    assert shown(generation("So."), generation("Or so.")).count('<h3 class="model">m&lt;1&gt;</h3>') == 2


@pytest.mark.parametrize(
    ("output", "settings", "told"),
    [
        ("So.", {}, None),
        ("<think>Long thought</think>So.", {"max_new_tokens": 12}, "Cut off before the answer"),
        ("A long answer.", {"max_new_tokens": 5}, "Cut off at the length limit"),
        ("<think>So.</think>", {}, "ended without an answer"),
    ],
)
def test_an_unusual_end_is_told(output: str, settings: dict[str, object], told: str | None) -> None:
    html = shown(generation(output, None, **settings))
    notes = re.findall(r'<p class="note">([^<]*)</p>', html)
    assert notes == [""] if told is None else told in notes[0]


def test_figures_and_the_context_meter() -> None:
    html = shown(generation("So it is."))
    assert re.search(r"<b>[\d.]+ tokens/s</b> · 9 tokens in \d+\.\d s · first token after", html)
    assert re.search(r'<meter min="0" max="10000" value="(\d+)" aria-label="Context in use"></meter> \1 of 10000', html)


def test_a_screen_reader_is_told_whole_paragraphs_that_never_change() -> None:
    output = "<think>Hm.</think>First <i>part.\n\nSecond part.\n\nThird."
    whole = generation(output)
    told = re.findall(r"<p>(.*?)</p>", spoken_html(Exchange("q", 0, None, [whole])), re.S)
    assert told[-3:] == ["First &lt;i&gt;part.", "Second part.", "Third."]
    for events in range(1, len(output) - 20):
        early = re.findall(r"<p>(.*?)</p>", spoken_html(Exchange("q", 0, None, [generation(output, events)])))
        assert [line for line in early if "seconds" not in line] == [line for line in told if "seconds" not in line][
            : len([line for line in early if "seconds" not in line])
        ]


def test_a_system_prompt_is_shown_folded_once_and_as_text() -> None:
    shown = system_prompts_to_html(["Be <b>brief</b>.", None, "Be <b>brief</b>."])
    assert shown.count("<details") == shown.count("Be &lt;b&gt;brief&lt;/b&gt;.") == 1
    assert system_prompts_to_html([None, None]) == ""
