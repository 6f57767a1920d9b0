"""As much of Go's text/template, and of Ollama's reader of Modelfiles, as the tests of Modelfiles need.

https://pkg.go.dev/text/template and https://docs.ollama.com/modelfile; anything else in a template is an error here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
_ACTION = re.compile(r'(\{\{-?\s*(?:"(?:\\.|[^"\\])*"|[^"}])*\}\})')
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+')


def ollama_prompt(template: str, messages: Sequence[Message]) -> str:
    """What Ollama (template/template.go) makes of a conversation: system prompts are collected, and stay messages."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = {
        "System": system,
        "Messages": [
            {"Role": each["role"], "Content": each["content"], "Thinking": each.get("thinking", "")}
            for each in messages
        ],
    }
    return execute(template, data)


def execute(template: str, data: Mapping[str, Any]) -> str:
    tokens = _ACTION.split(template)
    assert not any("{{" in text for text in tokens[::2]), "an action that is not closed"
    block, ending = _parse(iter(enumerate(tokens)))
    assert ending is None, f"{ending} without a beginning"
    return _run(block, data, {"$": data})


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile as (name, value): a value in quotes goes on until a line ends in them."""
    commands = []
    rest = text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            key, _, rest = rest.partition(" ")
            name = f"PARAMETER {key}"
        value = ""
        for line in rest.splitlines(keepends=True):
            value += line
            quotes = next((mark for mark in ('"""', '"') if value.startswith(mark)), "")
            whole = value.strip()
            if not quotes or (len(whole) >= 2 * len(quotes) and whole.endswith(quotes)):
                commands.append((name, whole[len(quotes) : len(whole) - len(quotes)]))
                break
        else:
            raise AssertionError(f"{name} is not closed")
        rest = rest[len(value) :]
    for _, value in commands:
        assert all(character.isprintable() or character in "\n\t" for character in value), "Ollama drops it"
    return commands


_Block = list[tuple[Any, ...]]


def _parse(tokens: Iterator[tuple[int, str]]) -> tuple[_Block, str | None]:
    """Nodes up to the end of the block, and the words that ended it."""
    block: _Block = []
    for index, token in tokens:
        if index % 2 == 0:
            block.append(("text", token))
            continue
        assert not token.startswith("{{-") and not token.endswith("-}}"), "trimming is not known here"
        action = token[2:-2].strip()
        keyword, _, words = action.partition(" ")
        if action == "end" or keyword == "else":
            return block, action
        if keyword == "if":
            block.append(_parse_if(words, tokens))
        elif keyword == "range":
            loop = re.fullmatch(r"(\$\w+), (\$\w+) := (\S+)", words)
            assert loop, words
            body, ending = _parse(tokens)
            assert ending == "end"
            block.append(("range", *loop.groups(), body))
        elif assignment := re.fullmatch(r"(\$\w+) := (.*)", action):
            block.append(("set", *assignment.groups()))
        else:
            block.append(("show", action))
    return block, None


def _parse_if(condition: str, tokens: Iterator[tuple[int, str]]) -> tuple[Any, ...]:
    then, ending = _parse(tokens)
    assert ending is not None
    if ending == "end":
        return ("if", condition, then, [])
    if ending == "else":
        otherwise, ending = _parse(tokens)
        assert ending == "end"
        return ("if", condition, then, otherwise)
    return ("if", condition, then, [_parse_if(ending.removeprefix("else if "), tokens)])


def _run(block: _Block, dot: Any, variables: dict[str, Any]) -> str:
    text = ""
    for kind, *node in block:
        if kind == "text":
            text += node[0]
        elif kind == "show":
            text += str(_value(node[0], dot, variables))
        elif kind == "set":
            variables = {**variables, node[0]: _value(node[1], dot, variables)}
        elif kind == "if":
            text += _run(node[1] if _value(node[0], dot, variables) else node[2], dot, variables)
        else:
            index_name, item_name, collection, body = node
            for index, item in enumerate(_value(collection, dot, variables)):
                text += _run(body, item, {**variables, index_name: index, item_name: item})
    return text


def _value(expression: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    words = _WORD.findall(expression)
    value, rest = _call(words, dot, variables)
    assert not rest, expression
    return value


def _call(words: list[str], dot: Any, variables: Mapping[str, Any]) -> tuple[Any, list[str]]:
    functions = {
        "eq": lambda a, b: a == b,
        "not": lambda a: not a,
        "and": lambda a, b: a and b,
        "len": len,
        "slice": lambda a, start: a[start:],
    }
    function = functions.get(words[0])
    values = []
    rest = words[1:] if function else words
    while rest and rest[0] != ")":
        word, *rest = rest
        if word == "(":
            value, rest = _call(rest, dot, variables)
            assert rest.pop(0) == ")"
        else:
            value = _operand(word, dot, variables)
        values.append(value)
    return (function(*values) if function else values[0]), rest


def _operand(word: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return re.sub(r"\\U([0-9a-f]{8})", lambda match: chr(int(match[1], 16)), word[1:-1])
    if word.isdigit():
        return json.loads(word)
    if word.startswith("$"):
        name, _, key = word.partition(".")
        return variables[name][key] if key else variables[name]
    assert word.startswith("."), word
    return dot[word[1:]]
