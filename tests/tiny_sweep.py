"""An experiments file whose runs take seconds: a random model of two layers, three steps, answers of a few tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import save_model

COMMON = """
overrides:
  model.base: {base}
  model.load_in_4bit: false
  model.dtype: float32
  model.max_seq_length: 1400
  data.limit: 24
  data.eval_rows: 6
  training.max_steps: 3
  training.logging_steps: 1
  export.quantizations: [F16]
  export.ship: F16
  export.imatrix: none
  export.include_base: false
  verify.prompts: 1
  evaluation.rows: 3
  evaluation.max_new_tokens: 4
"""


def write_experiments(folder: Path, experiments: str) -> Path:
    """``experiments`` is the YAML of the key of that name, or of ``grid``."""
    base = save_model(folder / "base", layers=2, dtype=torch.float32)
    path = folder / "tiny.yaml"
    path.write_text(f"config: smollm2-cpu\n{COMMON.format(base=base)}{experiments}", encoding="utf-8")
    return path
