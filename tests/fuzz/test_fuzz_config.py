"""Random configuration: a Config or one sentence, whatever the file and the overrides hold.

python -m pytest tests/fuzz -m fuzz
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.config import Config, load_config, preset_names
from pipeline.errors import MedcotError

pytestmark = pytest.mark.fuzz

INPUTS = 700


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from dotted_keys(field.annotation, f"{prefix}{name}.")


KEYS = sorted(dotted_keys(Config))
NAMES = sorted({part for key in KEYS for part in key.split(".")})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -1, 0, 1, 10**400])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "Q4_K_M", "F16", "float32", "1e-4", "inf", "sample"])
    | st.binary(max_size=4)
    | st.dates()
    | st.datetimes()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | SCALARS, inner, max_size=3),
    max_leaves=6,
)
PIECES = st.sampled_from(
    [
        "&a ",
        "*a",
        "- ",
        ": ",
        "? ",
        "!!int ",
        "!!binary ",
        "!!timestamp ",
        "!!set ",
        "!!omap ",
        "!!python/name:os ",
        "!x ",
    ]
    + [
        "<<: ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\n",
        "\n  ",
        "\n    ",
        "'",
        '"',
        "|",
        ">-",
        "#",
        "%YAML 1.1",
        "@",
        "`",
        "---\n",
    ]
    + [
        "...",
        "0x",
        "1e5",
        "2001-01-01",
        "2001-99-99",
        "0o9",
        "1:60",
        "~",
        ".nan",
        "=",
        "\t",
        "\0",
        "\x85",
        "\ud7ff",
        "ä",
    ]
    + [f"{name}: " for name in NAMES]
)
YAML_TEXT = st.text(max_size=60) | st.lists(PIECES, max_size=25).map("".join)
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), st.text(max_size=12) | YAML_TEXT).map("=".join),
    st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={dumped(pair[1])}"),
    st.text(max_size=20),
    st.lists(st.sampled_from([*NAMES, "", " ", "__class__", "0"]), max_size=4).map(
        lambda parts: ".".join(parts) + "=1"
    ),
)
UNHURRIED = settings(
    max_examples=INPUTS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


def dumped(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)


def check(name_or_path: str, overrides: Sequence[str] = ()) -> None:
    try:
        config = load_config(name_or_path, overrides)
    except MedcotError as error:
        message = str(error)
        assert message and message.splitlines() == [message]
        return
    # What was accepted can be written for the run and read back as the same.
    text = config.to_yaml()
    assert yaml.safe_load(text) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    "content",
    [
        "!!timestamp",
        "seed: !!int",
        "a: &a {b: *a}",
        "seed: &a [*a]",
        "1: 2",
        "data: {1: 2, ~: 3}",
        "data: " + "[" * 3000,
        "data: " + "[" * 300 + "]" * 300,
        "training: {epochs: .inf, weight_decay: .nan}",
        "seed: " + "9" * 5000,
        "a0: &a0 x\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
        + "seed: *a9\n",
    ],
    ids=lambda content: content[:20],
)
def test_yaml_that_once_was_too_much(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(MedcotError):
        load_config(str(tmp_path / "run.yaml"))
    check(str(tmp_path / "run.yaml"))


def test_random_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"

    @UNHURRIED
    @given(content=YAML_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(str(path))

    run()


def test_random_values_under_known_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"

    @UNHURRIED
    @given(values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
    def run(values: dict[str, Any]) -> None:
        nested: dict[str, Any] = {}
        for key, value in values.items():
            *sections, last = key.split(".")
            target = nested
            for section in sections:
                inner = target.setdefault(section, {})
                target = inner if isinstance(inner, dict) else target
            target[last] = value
        path.write_text(yaml.safe_dump(nested, allow_unicode=True), encoding="utf-8")
        check(str(path))

    run()


def test_random_overrides() -> None:
    @UNHURRIED
    @given(overrides=st.lists(OVERRIDES, max_size=3))
    def run(overrides: list[str]) -> None:
        check("smollm2-cpu", overrides)

    run()


def test_random_names() -> None:
    @UNHURRIED
    @given(name=st.text(max_size=12) | st.sampled_from([*preset_names(), "..", "/", "x" * 300]))
    def run(name: str) -> None:
        check(name)

    run()
