"""Steps that the gradient scaler skipped: what is tolerable, what is told, what is an error."""

import json

import pytest

from pipeline.checkpoints import Seal, TrainingProgress
from pipeline.errors import MedcotError
from pipeline.training.gradient_scaler import is_tolerable, require_a_step_taken, skipped_steps_sentence


@pytest.mark.parametrize(("skipped", "tolerable"), [(0, True), (12, True), (13, False), (60, False)])
def test_more_than_a_fifth_is_too_many(skipped: int, tolerable: bool) -> None:
    assert is_tolerable(skipped, 60) is tolerable


def test_it_is_told_in_one_sentence_and_with_the_remedy_where_it_matters() -> None:
    assert skipped_steps_sentence(0, 60) is None
    few, many = skipped_steps_sentence(3, 60), skipped_steps_sentence(20, 60)
    assert few is not None and few.startswith("3 of 60 steps were skipped by the gradient scaler, because")
    assert "training.max_steps" not in few
    assert many is not None and many.startswith("20 of 60 steps") and "set model.dtype=float32" in many
    assert ". " not in few and ". " not in many


def test_nothing_trained_is_an_error_with_cause_and_remedy() -> None:
    for skipped, steps in ((0, 60), (59, 60), (0, 0)):
        require_a_step_taken(skipped, steps)
    with pytest.raises(
        MedcotError, match=r"^Nothing was trained, because .* skipped all 6 steps: raise training\.max_"
    ):
        require_a_step_taken(6, 6)


def test_a_checkpoint_carries_the_count_and_an_older_one_has_none() -> None:
    progress = TrainingProgress(step=5, seconds=1.0, tokens=9, skipped_steps=2)
    sealed = json.loads(Seal(progress=progress, files=[]).model_dump_json())
    assert Seal.model_validate(sealed).progress.skipped_steps == 2
    del sealed["progress"]["skipped_steps"]
    assert Seal.model_validate(sealed).progress.skipped_steps == 0
