"""What is taken from a client's request, and the sentence with which the rest is refused."""

import json
from typing import Any

import pytest

from chat.api_request import ChatRequest, Refusal, parse_chat_request


def parse(**settings: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({"messages": [{"role": "user", "content": "Gout?"}], **settings}).encode())


def test_a_bare_request_leaves_everything_to_the_server() -> None:
    request = parse()
    assert request.conversation(None) == [{"role": "user", "content": "Gout?"}]
    assert request.conversation("Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert (request.temperature, request.top_p, request.seed, request.token_limit) == (None, None, None, None)
    assert (request.stops, request.thought_budget, request.stream) == ((), None, None)


def test_messages_become_what_a_template_takes() -> None:
    request = parse(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "A red "}, {"type": "text", "text": "toe?"}]},
            {"role": "assistant", "content": "Gout.", "reasoning_content": "Uric acid.", "refusal": None},
            {"role": "user", "content": "<think>mine</think> Sure?", "name": "Ann"},
        ]
    )
    assert request.conversation("The file's own.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A red toe?"},
        {"role": "assistant", "content": "Gout."},
        {"role": "user", "content": "<think>mine</think> Sure?"},
    ]
    assert request.question == "<think>mine</think> Sure?"


@pytest.mark.parametrize("thought", ["<think>\nUric acid.\n</think>\n\n", "Uric acid.\n</think>\n\n"])
def test_a_thought_sent_back_inside_the_content_is_dropped(thought: str) -> None:
    answered = {"role": "assistant", "content": f"{thought}Gout."}
    request = parse(messages=[{"role": "user", "content": "?"}, answered, {"role": "user", "content": "Sure?"}])
    assert request.conversation(None)[1] == {"role": "assistant", "content": "Gout."}


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "low"}, 256),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_budget_tokens": 7}, 7),
        ({"reasoning_budget_tokens": -1, "reasoning_effort": "none"}, None),
    ],
)
def test_how_long_the_model_may_think(settings: dict[str, Any], budget: int | None) -> None:
    assert parse(**settings).thought_budget == budget


def test_the_newer_name_of_the_token_limit_goes_first() -> None:
    assert parse(max_tokens=5).token_limit == 5
    assert parse(max_tokens=5, max_completion_tokens=6).token_limit == 6


def test_settings_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "logprobs": False, "tools": [], "tool_choice": "auto", "frequency_penalty": 0.0, "stop": None}
    ignored = {"user": "ann", "metadata": {"a": "b"}, "response_format": {"type": "text"}, "top_logprobs": None}
    assert parse(**neutral, **ignored) == parse()


@pytest.mark.parametrize(
    ("settings", "parameter", "message"),
    [
        ({"n": 2}, "n", "not supported by this server: leave it out"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"max_token": 5}, "max_token", "did you mean max_tokens?"),
        ({"zzz": 5}, "zzz", "no setting this server knows: leave it out"),
        ({"temperature": 3}, "temperature", "less than or equal to 2 (found 3)"),
        ({"temperature": "hot"}, "temperature", "valid number (found 'hot')"),
        ({"temperature": float("nan")}, "temperature", "found nan"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "'none', 'minimal'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Gout?"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string (found 5)"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role", "'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tools and audio are not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0",
            "'image_url' is not supported: the model reads text alone",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "must be the user's"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], parameter: str, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(**settings)
    assert (refused.value.parameter, refused.value.status) == (parameter, 400)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match=r"request's body is not"):
        parse_chat_request(body)
