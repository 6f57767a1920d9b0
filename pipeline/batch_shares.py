"""How the examples of an optimizer step are shared by the processes of a training.

``training.effective_batch`` is what one step sees on however many processes: the same configuration trains the same
model on one GPU and on two.
"""

from __future__ import annotations

from pipeline.config import TrainingConfig
from pipeline.errors import MedcotError
from pipeline.hardware import Choice


def most_processes(examples: int, limit: int) -> int:
    """The largest number up to ``limit`` of processes that can share a step's examples evenly."""
    return max(processes for processes in range(1, limit + 1) if examples % processes == 0)


def share_of_step(examples: int, batch_size: int, processes: int) -> tuple[int, int]:
    """(examples a forward pass, at most ``batch_size``; forward passes a step) of each process.

    Raises MedcotError when the step's examples cannot be shared evenly.
    """
    if examples % processes:
        raise MedcotError(
            f"{processes} processes cannot share the {examples} examples of a step (training.batch_size x "
            f"training.gradient_accumulation): make them a multiple of {processes}, or take "
            f"{most_processes(examples, processes)} processes."
        )
    share = examples // processes
    passes = next(passes for passes in range(1, share + 1) if share % passes == 0 and share // passes <= batch_size)
    return share // passes, passes


def processes_for(training: TrainingConfig, gpus: int) -> Choice:
    """How many processes a training takes on a machine with ``gpus`` GPUs, and why.

    Raises MedcotError when there are not as many GPUs as the configuration wants, or a step's examples cannot be
    shared by as many processes.
    """
    wanted, examples = training.processes, training.effective_batch
    if wanted == "auto":
        if gpus < 2:
            return Choice("1", "one GPU" if gpus else "no GPU")
        return Choice(str(most_processes(examples, gpus)), f"{gpus} GPUs, {examples} examples a step")
    if 0 < gpus < wanted:
        raise MedcotError(f"training.processes={wanted} and this machine has {gpus} GPU(s): set it to auto.")
    share_of_step(examples, examples, wanted)
    return Choice(str(wanted), "set by training.processes")
