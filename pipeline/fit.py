"""Whether a run fits a machine: what cannot be done, with the setting to change, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.choices import largest_batch
from pipeline.config import Config
from pipeline.estimate import UNQUANTIZED, Estimator, StageEstimate, Workload
from pipeline.hardware import GIBIBYTE, Hardware, has_kernels
from pipeline.platforms import KAGGLE, service_named
from pipeline.survey import Survey

_OLDEST_CAPABILITY = (7, 0)  # Unsloth's kernels need tensor cores (docs.unsloth.ai, system requirements)
_TIGHT = 0.85  # an estimate this near to what is there is told: it can be off by a quarter


def notes(hardware: Hardware, survey: Survey, estimates: Sequence[StageEstimate]) -> list[str]:
    """What does not stop a run and is worth knowing before it."""
    judged = [] if survey.complete else [f"judged by the first {survey.read:,} records; there are more"]
    return [
        *judged,
        *_no_gpu_notes(hardware, estimates),
        *_time_notes(hardware, estimates),
        *_tight_notes(hardware, estimates),
    ]


def problems(
    config: Config,
    hardware: Hardware,
    survey: Survey,
    work: Workload,
    estimator: Estimator,
    estimates: Sequence[StageEstimate],
) -> list[str]:
    """Why a run cannot be done here, each with the setting to change; empty when it can."""
    return [
        *_data_problems(config, survey, work),
        *_hardware_problems(hardware, estimates),
        *_memory_problems(config, hardware, estimator, estimates),
        *_disk_problems(config, hardware, estimates),
    ]


def _no_gpu_notes(hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    service = service_named(hardware.platform)
    if service is None or hardware.gpu_names or not _trains(estimates):
        return []
    return [f"this session has no GPU: {service.gpu_setting}"]


def _time_notes(hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    notes = []
    if any(each.seconds is None for each in estimates):
        notes.append(f"no time is given for training: the speed of {hardware.gpu_names[0]} is not known to medcot")
    limit = service_named(hardware.platform)
    total = sum(each.seconds or 0 for each in estimates)
    if limit is None:
        return notes
    notes.append(limit.limits)
    if total > limit.session_hours * 3600:
        slowest = max(estimates, key=lambda each: each.seconds or 0)
        advice = {
            "evaluate": "lower evaluation.rows or evaluation.max_new_tokens",
            "train": "lower training.max_steps or training.epochs",
        }.get(slowest.stage, f"run the others with --until {slowest.stage}")
        notes.append(
            f"{total / 3600:.0f} hours in all do not fit one session, most of them for {slowest.stage}: {advice}, or "
            "run the same command again in the next session, it goes on where it was"
        )
    return notes


def _tight_notes(hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    return [
        f"{each.stage} comes near to the {name} that is there ({_gibibytes(needed)} of {_gibibytes(there)}), and the "
        "estimate may be off by a quarter"
        for each in estimates
        for name, needed, there in (
            ("memory", each.memory_bytes - each.mapped_bytes, hardware.available_memory_bytes),
            ("GPU memory", each.gpu_memory_bytes, hardware.gpu_memory_bytes),
        )
        if _TIGHT * there < needed <= there
    ]


def _data_problems(config: Config, survey: Survey, work: Workload) -> list[str]:
    data = config.data
    if not survey.complete or survey.usable >= data.eval_rows + (data.train_rows or 1):
        return []
    reasons = ", ".join(f"{reason}: {count}" for reason, count in list(survey.reasons.items())[:3]) or "none rejected"
    return [
        f"{data.source} has {survey.usable} usable records ({reasons}), and {data.train_rows or 'at least 1'} for "
        f"training and {data.eval_rows} held out are wanted: lower data.train_rows or data.eval_rows, or raise "
        "data.limit"
    ]


def _hardware_problems(hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    capability = hardware.gpu_capability
    if capability is None or not _trains(estimates):
        return []
    advice = (service_named(hardware.platform) or KAGGLE).gpu_setting
    which = f"{hardware.gpu_names[0]} has compute capability {capability[0]}.{capability[1]}"
    if capability < _OLDEST_CAPABILITY:
        return [f"{which} and Unsloth needs 7.0: {advice}"]
    if not has_kernels(capability, hardware.gpu_architectures):
        built = ", ".join(hardware.gpu_architectures)
        return [f"{which} and this PyTorch has kernels for {built} alone: {advice}, or install a PyTorch for it"]
    return []


def _trains(estimates: Sequence[StageEstimate]) -> bool:
    return any(each.stage == "train" for each in estimates)


def _memory_problems(
    config: Config, hardware: Hardware, estimator: Estimator, estimates: Sequence[StageEstimate]
) -> list[str]:
    found = []
    for each in estimates:
        for name, needed, there in (
            ("memory", each.memory_bytes - each.mapped_bytes, hardware.available_memory_bytes),
            ("GPU memory", each.gpu_memory_bytes, hardware.gpu_memory_bytes),
        ):
            if needed > there:
                advice = _memory_advice(config, each, estimator, hardware)
                found.append(
                    f"{each.stage} needs about {_gibibytes(needed)} of {name} and {_gibibytes(there)} are there: "
                    f"{advice}"
                )
    return found


def _disk_problems(config: Config, hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    kept, downloaded = sum(each.disk_bytes for each in estimates), sum(each.cache_bytes for each in estimates)
    needs = [("the run", kept, hardware.free_disk_bytes), ("the download", downloaded, hardware.cache_disk_bytes)]
    if hardware.one_disk:
        needs = [("the run with its downloads", kept + downloaded, hardware.free_disk_bytes)]
    return [
        f"{what} takes about {_gibibytes(needed)} of disk and {_gibibytes(free)} are free: {_disk_advice(config)}"
        for what, needed, free in needs
        if needed > free
    ]


def _memory_advice(config: Config, stage: StageEstimate, estimator: Estimator, hardware: Hardware) -> str:
    """The setting that would help most."""
    if stage.stage == "bench" and config.bench.transformers:
        return "set bench.transformers=false"
    if stage.stage != "train":
        return "choose a smaller model.base, or stop before it with --until"
    there = hardware.gpu_memory_bytes or hardware.available_memory_bytes
    training = config.training
    if not config.model.load_in_4bit:
        return "set model.load_in_4bit=true"
    fitting = largest_batch(config, estimator, there)
    if 0 < fitting < estimator.batch_size:
        times = training.effective_batch // fitting
        return f"set training.batch_size={fitting} and training.gradient_accumulation={times}"
    if not training.gradient_checkpointing:
        return "set training.gradient_checkpointing=true"
    return "lower model.max_seq_length or choose a smaller model.base"


def _disk_advice(config: Config) -> str:
    large = [name for name in config.export.quantizations if name in UNQUANTIZED]
    if large and len(config.export.quantizations) > 1:
        return f"leave {large[0]} out of export.quantizations, or free some space"
    if config.export.include_base:
        return "set export.include_base=false, or free some space"
    return "free some space or choose another --run-dir"


def _gibibytes(size: float) -> str:
    return f"{size / GIBIBYTE:.1f} GiB"
