"""The page in a browser: a question streams, is stopped, hurried, retried; two users; a killed browser; a telephone.

Nothing on the page may be asked of another machine, so every request is looked at. Models are scripted and slow, but
for the last test's.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from chat_models import small_model

pytestmark = pytest.mark.broad
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
gradio = pytest.importorskip("gradio", reason="gradio is not installed (requirements-chat.txt)")

from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect  # noqa: E402
from web_pages import SlowModel, served  # noqa: E402

from chat.web import WebModel  # noqa: E402
from chat.web_server import open_model  # noqa: E402
from chat.web_texts import EXAMPLES, STILL_ANSWERING  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
THOUGHT = "<think>\nA hot, swollen toe points to a crystal arthritis, and an infection must be excluded.\n</think>\n\n"
TABLE = "| test | finding |\n| --- | --- |\n| uric acid | high |"
ANSWER = f"## Gout is likely\n\nA **hot** toe is *podagra*.\n\n{TABLE}\n\nRest."
EVIL = (
    "<script>document.title = 'owned'</script><img src=http://example.com/x.png onerror=\"document.title='owned'\">"
    "![x](http://example.com/y.png) [x](javascript:alert(1)) <iframe src=http://example.com></iframe> ${1+1} {{2*3}}"
)
LONG = " ".join(f"word{number}" for number in range(2000))
MINUTE = 60_000


@pytest.fixture(scope="module")
def driver() -> Iterator[Playwright]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(driver: Playwright) -> Iterator[Browser]:
    browser = launch(driver)
    yield browser
    browser.close()


def launch(driver: Playwright) -> Browser:
    return driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page as another user; at the end no request may have gone elsewhere, and no script may have failed."""
    contexts: list[BrowserContext] = []
    requests: list[str] = []
    failures: list[str] = []

    def opened(url: str, width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.goto(url)
        expect(box(page)).to_be_visible(timeout=MINUTE)
        return page

    yield opened
    for context in contexts:
        context.close()
    elsewhere = [url for url in requests if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", url)]
    assert requests and elsewhere == [] and failures == []


def box(page: Page) -> playwright.Locator:
    return page.get_by_label("Your question")


def ask(page: Page, question: str) -> None:
    box(page).fill(question)
    box(page).press("Enter")


def until_answered(page: Page, answers: int = 1) -> None:
    expect(page.locator("#current .figures")).to_have_count(answers, timeout=MINUTE)


def test_a_question_streams_its_thought_folds_and_its_answer_is_markdown(visit: Callable[..., Page]) -> None:
    model = SlowModel([THOUGHT + ANSWER], 0.01)
    with served([WebModel("m", model)]) as url:
        page = visit(url)
        ask(page, "A red toe?")
        thought = page.locator("#current details.thought")
        expect(thought).to_have_attribute("open", "")
        first = thought.inner_text()
        page.wait_for_function("before => document.querySelector('#current details').innerText != before", arg=first)
        expect(thought).to_have_attribute("open", "")
        expect(page.locator("#current .said")).to_be_visible()
        expect(thought).not_to_have_attribute("open", "")
        assert model.said < len(THOUGHT + ANSWER)
        until_answered(page)
        assert re.fullmatch(r"Thought \(15 words, \d+\.\d s\)", thought.locator("summary").inner_text())
        said = page.locator("#current .said")
        assert said.locator("h5").inner_text() == "Gout is likely"
        assert [said.locator(tag).count() for tag in ("strong", "em", "table")] == [1, 1, 1]
        assert re.search(r"[\d.]+ tokens/s · .* context\s+\d+ of 10000 tokens", page.locator(".figures").inner_text())
        told = page.get_by_role("log").inner_text().split("\n\n")
        assert [told[-3], told[-1]] == ["A **hot** toe is *podagra*.", "Rest."]
        thought.locator("summary").press("Enter")
        expect(thought).to_have_attribute("open", "")


def test_what_a_reader_folds_stays_folded_while_the_thought_goes_on(visit: Callable[..., Page]) -> None:
    with served([WebModel("m", SlowModel([f"<think>{LONG}", "So."]))]) as url:
        page = visit(url)
        ask(page, "x")
        thought = page.locator("#current details.thought")
        thought.locator("summary").click()
        before = thought.locator("summary").inner_text()
        expect(thought.locator("summary")).not_to_have_text(before)
        expect(thought).not_to_have_attribute("open", "")
        page.get_by_role("button", name="Answer now").click()
        expect(page.locator("#current .note")).to_have_text("The thought was ended by “Answer now”.", timeout=MINUTE)


def test_what_a_model_writes_neither_runs_nor_fetches(visit: Callable[..., Page]) -> None:
    with served([WebModel("m", SlowModel([f"<think>{EVIL}</think>{EVIL}"], 0.0))]) as url:
        page = visit(url)
        ask(page, f"x {EVIL}")
        until_answered(page)
        exchange = page.locator("#current")
        assert exchange.locator("img, script, iframe, a").count() == 0
        assert page.title() == "medcot: m"
        for shown in (exchange.locator(".said"), exchange.locator(".question")):
            assert "<script>" in shown.inner_text() and "${1+1} {{2*3}}" in shown.inner_text()


def test_stop_keeps_what_was_said_and_retry_replaces_it(visit: Callable[..., Page]) -> None:
    model = SlowModel([LONG, "Another answer.", "The last."])
    with served([WebModel("m", model)], seed=5) as url:
        page = visit(url)
        ask(page, "x")
        expect(page.locator("#current .said")).to_contain_text("word9")
        ask(page, "too soon")
        expect(page.locator("#status")).to_have_text(STILL_ANSWERING)
        expect(box(page)).to_have_value("too soon")
        page.get_by_role("button", name="Stop").click()
        until_answered(page)
        expect(page.locator("#current .note")).to_have_text("Stopped.")
        assert model.said < len(LONG)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        page.get_by_role("button", name="Retry").click()
        expect(page.locator("#current .said")).to_have_text("Another answer.")
        until_answered(page)
        assert page.locator("article").count() == 1
        assert [each["seed"] for each in model.sampling] == [5, 6]
        ask(page, "y")
        expect(page.locator("#current .said")).to_have_text("The last.")
        assert page.locator("#past article").count() == 1
        assert "Another answer." in model.prompts[-1] and "word9" not in model.prompts[-1]
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("article")).to_have_count(0)
        expect(box(page)).to_be_focused()


def test_sliders_and_examples_by_keyboard(visit: Callable[..., Page]) -> None:
    model = SlowModel(["So."])
    with served([WebModel("m", model)]) as url:
        page = visit(url)
        temperature = page.get_by_role("slider", name=re.compile("Temperature"))
        assert (temperature.get_attribute("min"), temperature.get_attribute("max")) == ("0.1", "1")
        temperature.press("End")
        page.get_by_role("slider", name=re.compile("Length")).press("Home")
        page.get_by_role("button", name=EXAMPLES[1]).press("Enter")
        expect(box(page)).to_have_value(EXAMPLES[1])
        expect(box(page)).to_be_focused()
        assert page.locator("#examples button").count() == 5
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("Explain.")
        page.keyboard.press("Enter")
        until_answered(page)
        assert model.sampling[0]["temperature"] == 1 and model.sampling[0]["max_new_tokens"] == 16
        assert f"{EXAMPLES[1]}\nExplain." in model.prompts[0]
        for _ in range(2):
            page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Retry")).to_be_focused()  # Stop and Answer now are disabled


def test_two_users_wait_for_each_other_and_see_only_their_own(visit: Callable[..., Page]) -> None:
    model = SlowModel([LONG, "The answer to the second."])
    with served([WebModel("m", model)]) as url:
        first, second = visit(url), visit(url)
        ask(first, "the secret of the first")
        expect(first.locator("#current .said")).to_contain_text("word1")
        ask(second, "the question of the second")
        expect(second.locator("#status")).to_have_text("Waiting: one question is before yours.")
        first.get_by_role("button", name="Stop").click()
        until_answered(second)
        expect(second.locator("#current .said")).to_have_text("The answer to the second.")
        assert "secret" not in second.content() and "second" not in first.locator("#talk").inner_text()
        assert "secret" not in model.prompts[1]


def test_two_models_answer_side_by_side_with_one_seed(visit: Callable[..., Page]) -> None:
    base, tuned = SlowModel(["From base."]), SlowModel(["<think>Hm.</think>From tuned."])
    with served([WebModel("base", base), WebModel("tuned", tuned)], seed=None) as url:
        page = visit(url)
        ask(page, "x")
        until_answered(page, 2)
        left, right = (page.get_by_role("region", name=name) for name in ("base", "tuned"))
        expect(left.locator(".said")).to_have_text("From base.")
        expect(right.locator(".said")).to_have_text("From tuned.")
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        assert left.bounding_box()["x"] < right.bounding_box()["x"]
        assert base.sampling == [{**tuned.sampling[0]}]


def test_a_telephone_shows_everything_and_the_red_flag_above_the_answer(visit: Callable[..., Page]) -> None:
    answer = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|" + " long header |" * 12 + "\n|" + " - |" * 12
    with served([WebModel("a" * 80, SlowModel([THOUGHT + answer], 0.0))]) as url:
        page = visit(url, 390)
        ask(page, "I have crushing chest pain. " + "z" * 300)
        until_answered(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        expect(page.locator("#current .figures")).to_be_in_viewport()
        expect(box(page)).to_be_in_viewport()
        flag = page.get_by_role("alert").filter(has_text="POSSIBLE HEART ATTACK")
        assert "Call 112 now" in flag.inner_text()
        assert flag.bounding_box()["y"] < page.locator("#current .thought").bounding_box()["y"]
        expect(page.get_by_role("note")).to_contain_text("not a doctor")


def test_an_overlong_question_gets_one_sentence(visit: Callable[..., Page]) -> None:
    with served([WebModel("m", SlowModel(["So."], n_ctx=500))]) as url:
        page = visit(url)
        for length, told in ((400, "takes 419 tokens"), (300_000, "has 300,000 characters")):
            ask(page, "x" * length)
            expect(page.locator("#current .problem")).to_contain_text(told, timeout=MINUTE)
            expect(page.locator("#current .problem")).to_contain_text("shorten it")
        ask(page, "And now?")
        expect(page.locator("#current .said")).to_have_text("So.")


@pytest.mark.parametrize("how", ["the tab is closed", "the browser is killed"])
def test_who_leaves_frees_the_model_for_the_next(how: str, driver: Playwright, visit: Callable[..., Page]) -> None:
    model = SlowModel([LONG, "The answer to the next."])
    with served([WebModel("m", model)]) as url:
        others = set(psutil.Process().children(recursive=True))
        leaving = launch(driver)
        page = leaving.new_page()
        page.goto(url)
        ask(page, "x")
        expect(page.locator("#current .said")).to_contain_text("word5")
        if how == "the tab is closed":
            page.close()
        else:
            for process in set(psutil.Process().children(recursive=True)) - others:
                process.kill()
        left = time.monotonic()
        next_one = visit(url)
        ask(next_one, "y")
        until_answered(next_one)
        expect(next_one.locator("#current .said")).to_have_text("The answer to the next.")
        assert time.monotonic() - left < 20 and model.said < len(LONG)
        leaving.close()


def test_the_small_model_answers_twice(visit: Callable[..., Page]) -> None:
    with open_model(small_model(), 1024, 1) as model, served([WebModel("SmolLM2", model)]) as url:
        page = visit(url)
        page.get_by_role("slider", name=re.compile("Length")).press("Home")
        for number, question in enumerate(("What is gout?", "And what is podagra?")):
            ask(page, question)
            expect(page.locator("#current .question")).to_contain_text(question)
            until_answered(page)
            assert page.locator("#current .said").inner_text()
            assert page.locator("#past article").count() == number
