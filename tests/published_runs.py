"""Small finished runs to publish, and a hub to publish them on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest
from hub_server import Account, HubServer
from pydantic import BaseModel
from safetensors.numpy import save
from test_report import BASE, TUNED, measurements
from test_run_folder import make_run

from export import hub_files
from pipeline.config import Config

TOKEN = "hf_anns_own"
F16 = "run-F16.gguf"
MODELFILE = f"""FROM ./{TUNED}
TEMPLATE \"\"\"{{{{ if .System }}}}<|im_start|>system
{{{{ .System }}}}<|im_end|>
{{{{ end }}}}\"\"\"
SYSTEM \"\"\"Think first.\"\"\"
PARAMETER stop "<|im_end|>"
PARAMETER num_ctx 8192
PARAMETER temperature 0.6
"""
PART_BYTES = 1 << 18
MODEL_BYTES = 3 * PART_BYTES + 1000


def adapter_files(base: str = "owner/base") -> dict[str, bytes]:
    weights = {"a.lora_A.weight": np.zeros((4, 300), np.float32)}
    config = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(weights),
        "tokenizer.json": b'{"model": {"vocab": {"/root": 0}}}',
        "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}',
        "medcot.json": json.dumps({"format": 1, "base": base, "template_sha256": "ab" * 32, "system": None}).encode(),
        "metrics.jsonl": b"{}\n",
    }


def finished_run(
    run_dir: Path,
    config: Config | None = None,
    results: dict[str, BaseModel] | None = None,
    *,
    base: str = "owner/base",
    shipped: bytes | None = None,
) -> Path:
    """A run with files to publish: random bytes as GGUFs, several parts long, and an adapter of ``base``."""
    results = dict(results or measurements())
    contents = {name: np.random.default_rng(len(name)).bytes(MODEL_BYTES) for name in (TUNED, F16, BASE)}
    contents[TUNED] = shipped or contents[TUNED]
    files = {"train": adapter_files(base), "export": {**contents, "Modelfile": MODELFILE.encode()}}
    make_run(run_dir, results, config, files)
    for name in ("checkpoints", "tracking"):
        (run_dir / "adapter" / name).mkdir()
        (run_dir / "adapter" / name / "optimizer.pt").write_bytes(b"state")
    return run_dir


@contextmanager
def writable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **account: Any) -> Iterator[HubServer]:
    """A hub that knows ann's token, which this process has; huggingface_hub asks there, and waits for nothing."""
    constants = huggingface_hub.constants
    account = {"name": "ann", "organizations": ("clinic",), **account}
    with HubServer(root=tmp_path / "hub", accounts={TOKEN: Account(**account)}, part_bytes=PART_BYTES) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.delenv("MEDCOT_RUNS", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(hub_files, "RETRY_WAITS", (0.0, 0.0))
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub
