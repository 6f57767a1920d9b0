"""Whether a run fits a machine: what cannot be done, with the setting to change, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.advice import disk_advice, training_advice
from pipeline.config import Config
from pipeline.estimate import Estimator
from pipeline.hardware import GIBIBYTE, Hardware, has_kernels
from pipeline.model_size import ModelSize
from pipeline.platforms import KAGGLE, service_named
from pipeline.stage_estimate import StageEstimate, Workload
from pipeline.survey import Survey
from pipeline.timeline import Timeline

_OLDEST_CAPABILITY = (7, 0)  # Unsloth's kernels need tensor cores (docs.unsloth.ai, system requirements)
_TIGHT = 0.85  # an estimate this near to what is there is told: it can be off by a quarter


def notes(
    config: Config, hardware: Hardware, survey: Survey, estimates: Sequence[StageEstimate], timeline: Timeline
) -> list[str]:
    """What does not stop a run and is worth knowing before it."""
    judged = [] if survey.complete else [f"judged by the first {survey.read:,} records; there are more"]
    return [
        *judged,
        *_no_gpu_notes(hardware, estimates),
        *_limit_notes(config, estimates),
        *_set_up_notes(timeline),
        *_time_notes(hardware, estimates, timeline),
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
        *_lora_problems(config, estimator.size),
        *_hardware_problems(hardware, estimates),
        *_memory_problems(config, hardware, estimator, estimates),
        *_disk_problems(hardware, estimator, estimates),
    ]


def _no_gpu_notes(hardware: Hardware, estimates: Sequence[StageEstimate]) -> list[str]:
    service = service_named(hardware.platform)
    if service is None or hardware.gpu_names or not _trains(estimates):
        return []
    return [f"this session has no GPU: {service.gpu_setting}"]


def _limit_notes(config: Config, estimates: Sequence[StageEstimate]) -> list[str]:
    """Of a stage that its max_minutes ends, what share of its work will be measured."""
    notes = []
    for each in estimates:
        if each.seconds is None or each.unlimited_seconds is None or each.unlimited_seconds <= each.seconds:
            continue
        section, what = {"evaluate": ("evaluation", "records"), "bench": ("bench", "measurements")}[each.stage]
        share = each.seconds / each.unlimited_seconds
        notes.append(
            f"{section}.max_minutes ends {each.stage} after {each.seconds / 60:.0f} of about "
            f"{each.unlimited_seconds / 60:.0f} minutes, with about {share:.0%} of its {what}"
        )
    return notes


def _set_up_notes(timeline: Timeline) -> list[str]:
    setup = timeline.setup
    if setup is None:
        return []
    packages = f"the first time, set-up takes about {setup.packages / 60:.0f} min before the run"
    builds = f"llama.cpp is compiled next to training in about {max(1, setup.builds / 60):.0f} min"
    if timeline.build_left < 60:
        return [f"{packages}, and {builds}"]
    return [
        f"{packages}, and {builds}, of which {timeline.build_left / 60:.0f} are left when export begins; a later "
        "session that is given the kept wheel needs none of them"
    ]


def _time_notes(hardware: Hardware, estimates: Sequence[StageEstimate], timeline: Timeline) -> list[str]:
    notes = []
    unknown = [each.stage for each in estimates if each.seconds is None]
    if unknown:
        notes.append(
            f"no time is given for {', '.join(unknown)}: the speed of {hardware.gpu_names[0]} is not known to medcot"
        )
    service = service_named(hardware.platform)
    if service is None:
        return notes
    notes.append(service.limits)
    total = timeline.seconds or sum(each.seconds or 0 for each in estimates)
    if total > service.session_hours * 3600:
        slowest = max(estimates, key=lambda each: each.seconds or 0)
        advice = {
            "evaluate": "set evaluation.max_minutes",
            "bench": "set bench.max_minutes",
            "train": "lower training.max_steps or training.epochs",
        }.get(slowest.stage, f"run the others with --until {slowest.stage}")
        notes.append(
            f"{total / 3600:.0f} hours in all do not fit one session, most of them for {slowest.stage}: {advice}, or "
            "run the same command again in the next session, it continues where it was"
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


def _lora_problems(config: Config, size: ModelSize) -> list[str]:
    known = [*size.projections, "embed_tokens", "lm_head"]
    unknown = [name for name in config.lora.target_modules if name not in known]
    if not unknown:
        return []
    return [
        f"lora.target_modules names {', '.join(unknown)}, which this model does not have: choose among "
        f"{', '.join(known)}"
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
        return [f"{which} and this PyTorch has kernels for {built} only: {advice}, or install a PyTorch for it"]
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
                found.append(
                    f"{each.stage} needs about {_gibibytes(needed)} of {name} and {_gibibytes(there)} are there: "
                    f"{_memory_advice(config, each, estimator, name, there)}"
                )
    return found


def _disk_problems(hardware: Hardware, estimator: Estimator, estimates: Sequence[StageEstimate]) -> list[str]:
    kept, downloaded = sum(each.disk_bytes for each in estimates), sum(each.cache_bytes for each in estimates)
    needs = [("the run", kept, hardware.free_disk_bytes), ("the download", downloaded, hardware.cache_disk_bytes)]
    if hardware.one_disk:
        needs = [("the run with its downloads", kept + downloaded, hardware.free_disk_bytes)]
    return [
        f"{what} takes about {_gibibytes(needed)} of disk and {_gibibytes(free)} are free: "
        + ("free some space" if what == "the download" else disk_advice(estimator, needed, free))
        for what, needed, free in needs
        if needed > free
    ]


def _memory_advice(config: Config, stage: StageEstimate, estimator: Estimator, which: str, there: float) -> str:
    if stage.stage == "bench" and which == "GPU memory":
        return "--set bench.gpu_layers=0"
    if stage.stage == "bench" and config.bench.transformers:
        return "--set bench.transformers=false"
    if stage.stage == "train":
        return training_advice(estimator, there)
    return f"choose a smaller model.base, or stop before {stage.stage} with --until"


def _gibibytes(size: float) -> str:
    return f"{size / GIBIBYTE:.1f} GiB"
