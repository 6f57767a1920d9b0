"""What a plan says of one stage, and the work that the data ask for."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from pipeline.config import Config


class Workload(BaseModel):
    """What the data ask for. Tokens are per example, prompt and completion."""

    model_config = ConfigDict(frozen=True)
    rows: int
    train_rows: int
    eval_rows: int
    mean_tokens: float
    mean_completion_tokens: float
    longest_tokens: int
    share_with_options: float = 0.0


class StageEstimate(BaseModel):
    """``seconds`` is None where the GPU's speed is not known; ``disk_bytes`` stays, ``cache_bytes`` is downloaded.

    ``mapped_bytes`` of the memory are a mapped file, which the system takes back when it needs the room.
    ``unlimited_seconds`` is what the stage would take without its ``max_minutes``.
    """

    model_config = ConfigDict(frozen=True)
    stage: str
    seconds: float | None
    memory_bytes: int
    mapped_bytes: int = 0
    gpu_memory_bytes: int = 0
    disk_bytes: int = 0
    cache_bytes: int = 0
    unlimited_seconds: float | None = None

    def within(self, max_minutes: float | None) -> StageEstimate:
        """The same, ended after so many minutes."""
        if max_minutes is None or self.seconds is None:
            return self
        seconds = min(self.seconds, 60 * max_minutes)
        return self.model_copy(update={"seconds": seconds, "unlimited_seconds": self.seconds})


def steps_of(config: Config, train_rows: int) -> int:
    """Optimizer steps of the training: max_steps, or as many as the epochs make."""
    training = config.training
    return training.max_steps or math.ceil(training.epochs * math.ceil(train_rows / training.effective_batch))
