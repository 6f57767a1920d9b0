"""Proof that GGUFs say what the trained model says: vocabulary, template, logits and weights, side by side.

    medcot verify GGUF --base BASE --adapter DIR

The reference is what trained: the Hugging Face tokenizer, and base + adapter in 32 bit under transformers and peft
(``export/verify_reference.py``). The most exact file of an export is compared with it; the others, the quantized
ones, with that file. Every GGUF is loaded in a child process (``export/verify_child.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.stress_corpus import STRESS_TEXTS
from export.verify_child import ask
from export.verify_limits import LogitLimits, limits_of, type_name
from export.verify_logits import LogitComparison, Logits, load_logits, mean_kl
from export.verify_predictions import (
    Distances,
    Ending,
    Role,
    adapter_check,
    end_of_turn_check,
    logit_checks,
)
from export.verify_probe import Answer, Request, VocabularyView, logits_path
from export.verify_reference import Reference
from export.verify_tensors import TensorErrors, compare_tensors
from export.verify_vocabulary import vocabulary_checks
from pipeline.artifacts import Artifact, write_json
from pipeline.config import Config, VerifyConfig
from pipeline.errors import GateFailed, MedcotError
from pipeline.prompts import Example
from pipeline.results import Check, ExportedModels, FileComparison, Verification

RESULT_NAME = "verification.json"
_TRAINED_RECORDS = 1000  # of the training set, whose ids are compared: some seconds a file


@dataclass(frozen=True)
class File:
    """A GGUF to verify; ``role`` base says that the adapter must not be in it."""

    path: Path
    role: Role = "tuned"


def verify(config: Config, inputs: dict[str, Path], out_dir: Path) -> Verification:
    """Stage: compare the exported files with base + adapter, write verification.json, or raise GateFailed."""
    from pipeline.base_model import local_base
    from pipeline.prepare import EVAL_FILE, TRAIN_FILE, load_examples

    exported = Artifact.load(inputs["export"], ExportedModels).result
    result = verify_exported(
        inputs["export"],
        exported,
        local_base(config.model.base, config.model.revision),
        inputs["train"],
        load_examples(inputs["prepare"] / EVAL_FILE),
        config.verify,
        system=config.prompt.system,
        trained=load_examples(inputs["prepare"] / TRAIN_FILE)[:_TRAINED_RECORDS],
    )
    write_json(out_dir / RESULT_NAME, result.model_dump(mode="json"))
    raise_if_failed(result)
    return result


def verify_exported(
    folder: Path,
    exported: ExportedModels,
    base: Path,
    adapter: Path | None,
    conversations: Sequence[Example],
    thresholds: VerifyConfig,
    *,
    system: str | None = None,
    trained: Sequence[Example] = (),
    threads: int | None = None,
) -> Verification:
    """Compare all files of one export in ``folder`` with the model they should be; ``base`` is a local folder.

    Logits are compared on the first ``thresholds.prompts`` conversations, ids on ``trained`` as well. Differences are
    told, not raised.
    """
    exact_first = sorted(
        exported.files,
        key=lambda file: (file.role != "tuned", -file.bits_per_weight, file.quantization == "BF16"),
    )
    files = [File(folder / file.name, file.role) for file in exact_first]
    reference = Reference(base, adapter, system)
    verifier = _Verifier(reference, conversations[: thresholds.prompts], thresholds, threads, trained)
    return verifier.verify(files)


def verify_gguf(
    gguf: Path,
    base: Path,
    adapter: Path | None,
    conversations: Sequence[Example],
    thresholds: VerifyConfig,
    system: str | None = None,
    *,
    threads: int | None = None,
) -> Verification:
    """Compare one GGUF with the model it should be; ``base`` is a local folder. Differences are told, not raised.

    Thresholds are for files without quantization; quantized ones have limits of their own by type.
    """
    return _Verifier(Reference(base, adapter, system), conversations, thresholds, threads).verify([File(gguf)])


def raise_if_failed(result: Verification) -> None:
    """Raise GateFailed naming the first failed check."""
    failed = [check for check in result.checks if not check.passed]
    if failed:
        others = f" ({len(failed) - 1} more checks failed)" if len(failed) > 1 else ""
        raise GateFailed(f"The GGUF is not the trained model: {failed[0].name}: {failed[0].detail}{others}")


@dataclass(frozen=True)
class _Compared:
    """What one file predicts, against its reference; ``distances`` where there is an adapter."""

    logits: LogitComparison
    endings: list[Ending]
    distances: Distances | None


@dataclass(frozen=True)
class _Exact:
    """The most exact file, after it was compared with the reference; its logits are in ``folder``.

    ``untuned`` are the reference's logits of the first conversation without the adapter, where there is one.
    """

    path: Path
    folder: Path
    view: VocabularyView
    untuned: Logits | None


class _Verifier:
    def __init__(
        self,
        reference: Reference,
        examples: Sequence[Example],
        thresholds: VerifyConfig,
        threads: int | None,
        trained: Sequence[Example] = (),
    ) -> None:
        if not examples:
            raise MedcotError("There is no conversation to compare logits on: give at least one held-out record.")
        self._reference = reference
        self._examples = examples
        self._thresholds = thresholds
        self._threads = threads
        self._trained = trained

    def verify(self, files: Sequence[File]) -> Verification:
        """``files`` begin with the most exact one, which must be a tuned one."""
        first, *others = files
        request = self._reference.request(
            first.path,
            self._examples,
            STRESS_TEXTS,
            self._thresholds.max_new_tokens,
            self._threads,
            self._trained,
        )
        with tempfile.TemporaryDirectory(prefix="medcot-verify-") as name:
            folder = Path(name) / "exact"
            answer = ask(request, folder)
            if isinstance(answer, str):
                return _result([Check(name="loads", passed=False, detail=answer)])
            view = self._reference.view(request, answer.view.size)
            checks = [
                Check(name="loads", passed=True, detail=f"llama.cpp loads {first.path.name} in a child process"),
                *vocabulary_checks(request, view, answer, self._reference.recipe),
            ]
            untuned = (
                self._reference.logits(request.evaluate[0], adapted=False) if self._reference.has_adapter else None
            )
            exact = _Exact(first.path, folder, view, untuned)
            compared = self._compare(
                request, exact, folder, "tuned", lambda i: self._reference.logits(request.evaluate[i])
            )
            if isinstance(compared, str):
                return _result([*checks, Check(name="logits", passed=False, detail=compared)])
            limits = limits_of(answer.file_type, self._thresholds)
            checks += self._prediction_checks(request, answer, compared, limits, "tuned")
            measured = [_measured(first.path, "base + adapter in 32 bit", compared, answer, limits)]
            for other in others:
                with tempfile.TemporaryDirectory(dir=name) as other_folder:
                    other_checks, figures = self._other_file(request, exact, other, Path(other_folder))
                checks += other_checks
                measured += [figures] if figures else []
        return _result(checks, compared.logits, measured)

    def _other_file(
        self, request: Request, exact: _Exact, file: File, folder: Path
    ) -> tuple[list[Check], FileComparison | None]:
        """A further file of the same export: the same vocabulary and template, its predictions near the exact one's.

        The base is compared with the reference without the adapter, on the first conversation only.
        """
        of = f"of {file.path.name}"
        is_base = file.role == "base"
        evaluate = request.evaluate[:1] if is_base else request.evaluate
        asked = request.model_copy(update={"gguf": file.path.absolute(), "evaluate": evaluate, "max_new_tokens": 0})
        answer = ask(asked, folder)
        if isinstance(answer, str):
            return [Check(name=f"vocabulary {of}", passed=False, detail=answer)], None
        if is_base and answer.view.size != exact.view.size:
            detail = f"{answer.view.size} tokens, the adapter has its own {exact.view.size}: nothing is compared"
            return [Check(name=f"vocabulary {of}", passed=True, detail=detail)], None
        vocabulary = vocabulary_checks(asked, exact.view, answer, self._reference.recipe)
        checks = [_all_of(f"vocabulary {of}", vocabulary, "loads; token ids, templates, BOS and EOS are equal")]
        untuned = exact.untuned if is_base else None
        compared = self._compare(
            asked,
            exact,
            folder,
            file.role,
            lambda i: load_logits(logits_path(exact.folder, i)) if untuned is None else untuned,
        )
        if isinstance(compared, str):
            return [*checks, Check(name=f"logits {of}", passed=False, detail=compared)], None
        limits = limits_of(answer.file_type, self._thresholds, is_base=is_base)
        predictions = self._prediction_checks(asked, answer, compared, limits, file.role)
        checks.append(_all_of(f"logits {of}", predictions, "; ".join(check.detail for check in predictions)))
        errors = None if is_base else compare_tensors(exact.path, file.path)
        if errors:
            shown = (
                f"{errors.tensors} tensors; {errors.worst} is farthest from the most exact file's: {errors.error:.3g}"
            )
            checks.append(Check(name=f"weights {of}", passed=errors.fault is None, detail=errors.fault or shown))
        if not compared.logits.finite:
            return checks, None
        reference = "base in 32 bit" if is_base else exact.path.name
        return checks, _measured(file.path, reference, compared, answer, limits, errors)

    def _compare(
        self, request: Request, exact: _Exact, folder: Path, role: Role, expected_of: Callable[[int], Logits]
    ) -> _Compared | str:
        """The child's logits in ``folder`` with those expected; a sentence where they have another shape."""
        comparison, endings, distances = LogitComparison(), [], None
        for index, ids in enumerate(request.evaluate):
            expected, found = expected_of(index), load_logits(logits_path(folder, index))
            if expected.shape != found.shape:
                return f"{found.shape[1]} logits a position, the model has {expected.shape[1]}"
            comparison.add(expected, found, index)
            endings.append(Ending.of(ids, expected, found))
            if index == 0 and exact.untuned is not None:
                tuned = expected if role == "tuned" else load_logits(logits_path(exact.folder, 0))
                distances = Distances(
                    from_tuned=mean_kl(tuned, found),
                    from_base=mean_kl(exact.untuned, found),
                    between=mean_kl(tuned, exact.untuned),
                )
        return _Compared(comparison, endings, distances)

    def _prediction_checks(
        self, request: Request, answer: Answer, compared: _Compared, limits: LogitLimits, role: Role
    ) -> list[Check]:
        text = self._reference.text
        checks = logit_checks(compared.logits, limits, request.evaluate, text)
        if compared.distances and compared.logits.finite:
            checks.append(adapter_check(role, compared.distances, limits))
        return [*checks, end_of_turn_check(compared.endings, answer, limits, text)]


def _all_of(name: str, checks: Sequence[Check], detail: str) -> Check:
    """Several checks of a further file as one: the first difference, or ``detail``."""
    failed = next((check for check in checks if not check.passed), None)
    return Check(name=name, passed=failed is None, detail=f"{failed.name}: {failed.detail}" if failed else detail)


def _measured(
    path: Path,
    reference: str,
    compared: _Compared,
    answer: Answer,
    limits: LogitLimits,
    errors: TensorErrors | None = None,
) -> FileComparison:
    return FileComparison(
        name=path.name,
        quantization=type_name(answer.file_type),
        reference=reference,
        positions=compared.logits.positions,
        mean_kl=compared.logits.mean_kl,
        p99_kl=compared.logits.p99_kl,
        top1_agreement=compared.logits.top1_agreement,
        max_mean_kl=limits.max_mean_kl,
        min_top1=limits.min_top1,
        worst_tensor=errors.worst if errors else None,
        tensor_error=errors.error if errors else None,
    )


def _result(
    checks: list[Check], logits: LogitComparison | None = None, files: Sequence[FileComparison] = ()
) -> Verification:
    """Without finite logits nothing was compared, and the numbers are those of unrelated ones."""
    known = logits if logits is not None and logits.finite else None
    return Verification(
        checks=checks,
        logit_nmse=known.nmse if known else 1.0,
        top1_agreement=known.top1_agreement if known else 0.0,
        positions=known.positions if known else 0,
        passed=all(check.passed for check in checks),
        files=list(files) if known else [],
    )
