"""A conversation in a file: what was said and how the model was asked, as JSON with a version."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from chat.session import Sampling, Session
from chat.turn import Turn
from pipeline.artifacts import write_text
from pipeline.errors import MedcotError


class Conversation(BaseModel):
    """``system`` is the user's own prompt: None where the model's was left, "" where it was taken away.

    ``model`` is the name of the file that answered last. Thoughts are kept, and so are turns that the context had no
    more room for, though the model does not see them again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    medcot_conversation: Literal[1] = 1
    model: str
    system: str | None
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    thought_budget: int | None
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, session: Session, model_name: str) -> Conversation:
        return cls(
            model=model_name,
            system=session.own_system,
            temperature=session.sampling.temperature,
            top_p=session.sampling.top_p,
            seed=session.sampling.seed,
            max_new_tokens=session.max_new_tokens,
            thought_budget=session.thought_budget,
            turns=(*session.forgotten, *session.history),
        )

    def resume(self, session: Session) -> None:
        """Make ``session`` go on with this conversation and its settings.

        Raises MedcotError, with the session unchanged, where the model takes no system prompt and this has one.
        """
        session.set_system(self.system)
        session.sampling = Sampling(self.temperature, self.top_p, self.seed)
        session.max_new_tokens = self.max_new_tokens
        session.thought_budget = self.thought_budget
        session.clear()
        session.history += self.turns


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Write the whole file or nothing; raises MedcotError."""
    try:
        write_text(path, conversation.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise MedcotError(f"The conversation cannot be written to {path}: {error.strerror or error}.") from error


def read_conversation(path: Path) -> Conversation:
    """Raises MedcotError when there is no such file, or it holds something else."""
    try:
        return Conversation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MedcotError(f"The conversation {path} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MedcotError(
            f"{path} holds no conversation of this medcot ({where + ': ' if where else ''}{first['msg']}): name a file "
            "that /save or --history wrote."
        ) from error
