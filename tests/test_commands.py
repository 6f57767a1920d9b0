"""What commands refuse, and what a conversation's file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_models import ScriptedModel

from chat.commands import Commands, change_setting, thought_budget
from chat.conversation_file import Conversation, read_conversation, write_conversation
from chat.display import Streams
from chat.session import Sampling, Session
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat


def session(*outputs: str, system: str | None = None) -> Session:
    return Session(ScriptedModel(outputs, system=system), Sampling(0.5, 0.9, 3), 100)


def talk(*outputs: str) -> Session:
    made = session(*outputs)
    for index in range(len(outputs)):
        list(made.ask(f"question {index} 心"))
    return made


def commands(of: Session, history: Path | None = None) -> Commands:
    return Commands(of, Streams.standard(), "m.gguf", lambda: None, history)


def test_a_conversation_comes_back_whole(tmp_path: Path) -> None:
    first = talk("<think>\x1b\ud7ff</think>One 🫀", "Two")
    first.thought_budget = 40
    first.set_system("Be brief.")
    write_conversation(tmp_path / "c.json", Conversation.of(first, "m.gguf"))
    second = session("Three")
    second.set_system("Other.")
    read_conversation(tmp_path / "c.json").resume(second)
    assert second.history == first.history and second.sampling == first.sampling
    assert (second.max_new_tokens, second.thought_budget, second.system) == (100, 40, "Be brief.")
    assert Conversation.of(second, "m.gguf") == Conversation.of(first, "m.gguf")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"medcot_conversation": 2}', b'{"turns": []}'])
def test_what_is_no_conversation_is_told_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(MedcotError, match=r"x\.json holds no conversation of this medcot .* name a file") as told:
        read_conversation(path)
    assert "\n" not in str(told.value)
    with pytest.raises(MedcotError, match="holds no conversation"):
        commands(session()).run(f"/save {path}")
    assert path.read_bytes() == content


def test_files_that_cannot_be_read_or_written_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="cannot be read: No such file"):
        read_conversation(tmp_path / "none.json")
    with pytest.raises(MedcotError, match="cannot be read: Is a directory"):
        commands(session()).run(f"/save {tmp_path}")
    (tmp_path / "file").touch()
    with pytest.raises(MedcotError, match=r"cannot be written to .*: (Not a directory|File exists)"):
        commands(session()).run(f"/save {tmp_path / 'file' / 'c.json'}")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.json"
    write_conversation(path, Conversation.of(talk("One"), "m.gguf"))
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MedcotError, match="No space left"):
        commands(talk("One", "Two"), path).save_history()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_conversation_whose_system_prompt_the_model_refuses_changes_nothing(tmp_path: Path) -> None:
    told = talk("One")
    told.set_system("Be brief.")
    conversation = Conversation.of(told, "m.gguf")
    refusing = talk("Mine")
    model = refusing.model
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    assert isinstance(model, ScriptedModel)
    model.chat_format = ChatFormat(no_system + model.chat_format.template, model.vocabulary)
    before = Conversation.of(refusing, "m.gguf")
    with pytest.raises(MedcotError, match="no system role"):
        conversation.resume(refusing)
    assert Conversation.of(refusing, "m.gguf") == before


def test_the_file_names_its_format(tmp_path: Path) -> None:
    write_conversation(tmp_path / "c.json", Conversation.of(talk("One"), "m.gguf"))
    assert json.loads((tmp_path / "c.json").read_text())["medcot_conversation"] == 1


@pytest.mark.parametrize(("text", "budget"), [("on", None), ("off", 0), ("1", 1), ("400", 400), ("1000000", 1_000_000)])
def test_thought_budgets(text: str, budget: int | None) -> None:
    assert thought_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "yes", "nan", "1e3", "9" * 5000])
def test_what_is_no_thought_budget(text: str) -> None:
    with pytest.raises(MedcotError, match="thought's budget is on, off or a number of tokens, not ") as told:
        thought_budget(text)
    assert len(str(told.value)) < 150


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "2"), ("temperature", "0"), ("top_p", "1"), ("seed", "2147483647"), ("max_tokens", "5")],
)
def test_settings_are_changed_one_at_a_time(name: str, value: str) -> None:
    changed, same = session(), session()
    change_setting(changed, name, value)
    now = {**vars(changed.sampling), "max_tokens": changed.max_new_tokens}
    assert now == {**vars(same.sampling), "max_tokens": same.max_new_tokens, name: float(value)}


@pytest.mark.parametrize(
    "line",
    [
        "/set temperature 2.1", "/set temperature -1", "/set temperature nan", "/set temperature", "/set top_p 2",
        "/set seed -1", "/set seed 2147483648", "/set seed 1.5", "/set max_tokens 0", "/set nothing 1", "/fold maybe",
        "/load", "/save", "/copy", "/thought", "/nothing", "/nothing at all", "/think maybe",
    ],
)  # fmt: skip
def test_what_a_command_cannot_do_is_one_sentence_and_changes_nothing(line: str) -> None:
    before = session()
    tried = session()
    with pytest.raises(MedcotError) as told:
        commands(tried).run(line)
    assert "\n" not in str(told.value)
    assert Conversation.of(tried, "m") == Conversation.of(before, "m")


@pytest.mark.parametrize("line", ["What is /new?", "/ what", "/etc/passwd", "1/2 tablet", "/NEW"])
def test_what_is_no_command_is_a_question(line: str) -> None:
    assert not commands(session()).run(line)


def test_copying_needs_a_terminal() -> None:
    with pytest.raises(MedcotError, match="no terminal to copy through"):
        commands(talk("One")).run("/copy")
