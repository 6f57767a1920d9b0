"""Preflight: what a run would do and take, whether it can, and proof that the reasoning is in the labels.

    medcot plan smollm2-cpu
    medcot plan deepseek-r1-8b --machine kaggle-t4

Nothing is downloaded but a model's configuration and tokenizer, and nothing is trained. Large data sets are judged
by their first records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline import fit
from pipeline.base_model import base_is_here, load_tokenizer, local_base
from pipeline.cache import cache_dir
from pipeline.choices import NamedChoice, training_choices
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.estimate import Estimator
from pipeline.feasibility import Preview, refusals
from pipeline.hardware import Hardware, compute_dtype, detect
from pipeline.labels import Fragment, label_verdict, loss_mask
from pipeline.model_size import ModelSize
from pipeline.prompts import ChatFormat
from pipeline.records import Record
from pipeline.setup_time import SetUp
from pipeline.speeds import measure_cpu_gflops
from pipeline.stage_estimate import StageEstimate, Workload, steps_of
from pipeline.survey import Survey, survey_records, workload_of
from pipeline.timeline import Timeline
from pipeline.vocabulary import TransformersVocabulary


class Plan(BaseModel):
    """What ``medcot plan`` found; ``problems`` is empty when the run can start, ``notes`` are worth knowing."""

    model_config = ConfigDict(frozen=True)
    name: str
    platform: str
    choices: list[NamedChoice]
    survey: Survey
    workload: Workload
    steps: int
    tokens_trained: int
    parameters: int
    trained_parameters: int
    cpu_gflops: float
    stages: list[StageEstimate]
    timeline: Timeline
    memory_bytes: int
    gpu_memory_bytes: int
    disk_bytes: int
    cache_disk_bytes: int
    example: list[Fragment]
    verdict: str
    notes: list[str]
    problems: list[str]


@dataclass(frozen=True)
class Subject:
    """The base and the data as a plan reads them: what takes the time, and is the same on every machine."""

    base: Path
    size: ModelSize
    vocabulary: TransformersVocabulary
    chat_format: ChatFormat
    records: list[Record]
    survey: Survey
    verdict: str
    fault: str | None

    @classmethod
    def of(cls, config: Config, stages: Sequence[str] | None = None) -> Subject:
        """Raises MedcotError where base or data cannot be read."""
        base = local_base(config.model.base, config.model.revision, weights=False)
        try:
            size = ModelSize.of(base)
        except MedcotError:
            # Of a model of another kind: what export says of it is the cause.
            refused = refusals(Preview(config, base), stages)
            if refused:
                raise MedcotError("; ".join(refused) + ".") from None
            raise
        tokenizer = load_tokenizer(base)
        vocabulary = TransformersVocabulary(tokenizer)
        chat_format = ChatFormat(tokenizer.chat_template, vocabulary, config.prompt.system)
        records, survey = survey_records(config, chat_format)
        verdict, fault = label_verdict(
            chat_format, vocabulary, [record.example for record in records], config.truncated_at
        )
        return cls(base, size, vocabulary, chat_format, records, survey, verdict, fault)


def make_plan(
    config: Config,
    run_dir: Path | None = None,
    hardware: Hardware | None = None,
    stages: Sequence[str] | None = None,
    subject: Subject | None = None,
) -> Plan:
    """Look at data, model and machine; raises MedcotError where they cannot be read.

    ``hardware`` is a machine to plan for instead of this one; ``stages`` are those that will run (default: all);
    ``subject`` is what an earlier plan of the same base and data has read.
    """
    subject = subject or Subject.of(config, stages)
    survey, records = subject.survey, subject.records
    here = hardware is None
    hardware = hardware or detect(run_dir or Path.cwd(), cache_dir())
    gflops = hardware.cpu_gflops or measure_cpu_gflops()
    dtype = compute_dtype(config.model.dtype, hardware)
    work = workload_of(config, records, survey)
    downloaded = here and base_is_here(config.model.base, config.model.revision)
    estimator = Estimator(config, subject.size, work, hardware, gflops, dtype.value, base_is_here=downloaded)
    estimates = [each for each in estimator.stages() if stages is None or each.stage in stages]
    timeline = Timeline.of(estimates, None if here else SetUp.on(hardware, gflops))
    steps = steps_of(config, work.train_rows)
    where_it_trains = hardware.gpu_memory_bytes or hardware.available_memory_bytes
    return Plan(
        name=config.name,
        platform=hardware.platform,
        choices=training_choices(config, hardware, dtype, estimator, where_it_trains),
        survey=survey,
        workload=work,
        steps=steps,
        tokens_trained=round(steps * config.training.effective_batch * work.mean_tokens),
        parameters=subject.size.parameters,
        trained_parameters=subject.size.trained(config.lora),
        cpu_gflops=round(gflops, 1),
        stages=estimates,
        timeline=timeline,
        memory_bytes=hardware.available_memory_bytes,
        gpu_memory_bytes=hardware.gpu_memory_bytes,
        disk_bytes=hardware.free_disk_bytes,
        cache_disk_bytes=hardware.cache_disk_bytes,
        example=loss_mask(subject.chat_format, subject.vocabulary, records[0].example, config.truncated_at)
        if records
        else [],
        verdict=subject.verdict,
        notes=fit.notes(config, hardware, survey, estimates, timeline),
        problems=[
            *([subject.fault] if subject.fault else []),
            *refusals(Preview(config, subject.base, records), stages),
            *fit.problems(config, hardware, survey, work, estimator, estimates),
        ],
    )


def raise_if_impossible(plan: Plan) -> None:
    if plan.problems:
        # A full stop behind an option would be copied with it.
        raise MedcotError("; ".join(plan.problems) + ("" if "--set" in plan.problems[-1] else "."))
