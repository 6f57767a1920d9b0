"""Folders that a plan takes for the presets' bases and data: real configurations, tokenizers and text, no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_model_size import LLAMA_8B, TINYLLAMA

from pipeline.config import Config, load_config

SHARED = Path("../shared")
# config.json of unsloth/DeepSeek-R1-Distill-Llama-8B and of TinyLlama/TinyLlama-1.1B-Chat-v1.0, without what a plan
# does not read.
_R1 = LLAMA_8B | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
}
_TINYLLAMA = TINYLLAMA | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_BASES = {
    "deepseek-r1-8b": (_R1, "deepseek-r1-distill-llama-8b"),
    "tinyllama-flashcards": (_TINYLLAMA, "tinyllama-1.1b-chat"),
}


def preset_here(name: str, folder: Path, *overrides: str) -> Config:
    """The preset with its base and data as files in ``folder``; skips the test where ../shared is missing."""
    if name not in _BASES:
        return load_config(name, overrides)
    if not SHARED.is_dir():
        pytest.skip("../shared, with the presets' tokenizers and data, is not here")
    architecture, tokenizer = _BASES[name]
    base = folder / name
    if not base.is_dir():
        shutil.copytree(SHARED / "tokenizers" / tokenizer, base)
        (base / "config.json").write_text(json.dumps(architecture))
    source = _records(name, folder)
    return load_config(name, [f"model.base={base}", f"data.source={source}", "data.config=null", *overrides])


def _records(name: str, folder: Path) -> Path:
    """medical-o1-reasoning-SFT has no options; flashcards are given as MedQuAD's, which are longer than they are."""
    if name == "tinyllama-flashcards":
        return SHARED / "data/medquad_flashcards.jsonl"
    path = folder / "records.jsonl"
    if not path.is_file():
        lines = (SHARED / "data/medical_o1_sample.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines] * 4
        kept = [{key: row[key] for key in ("Question", "Complex_CoT", "Response")} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return path
