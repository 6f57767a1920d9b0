"""Proof that a GGUF says what the trained model says: vocabulary, template and logits, side by side.

    medcot verify GGUF --base BASE --adapter DIR

The reference is what trained: the Hugging Face tokenizer, and base + adapter in 32 bit under transformers and
peft. The GGUF is loaded in a child process, because libllama aborts the process on some broken files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import LlamaFileType

from export.export import tokenizer_folder
from export.stress_corpus import STRESS_TEXTS, control_token_texts
from export.verify_probe import (
    ANSWER_NAME,
    REQUEST_NAME,
    Answer,
    Conversation,
    ReferenceExample,
    Request,
    VocabularyView,
    logits_path,
    vocabulary_view,
)
from pipeline.artifacts import Artifact, write_json
from pipeline.config import Config, VerifyConfig
from pipeline.errors import GateFailed, MedcotError
from pipeline.prompts import ChatFormat, Example
from pipeline.results import Check, ExportedModels, Verification

RESULT_NAME = "verification.json"
# Longest conversation whose logits are compared (tokens): 512 x 128,256 logits are 263 MB of temporary disk.
_MAX_POSITIONS = 512
_PROBE_TIMEOUT_SECONDS = 3600
_SHOWN_IDS = 8
_WITHOUT_LOSS = {LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16}


@dataclass(frozen=True)
class LogitLimits:
    max_nmse: float
    min_top1: float


# Quantized files against the 32-bit model. Set from SmolLM2-135M (the smallest model we ship, so the one that
# quantization hurts most) with room above what was measured; a broken export is far beyond any of them.
_QUANTIZED_LIMITS = {
    LlamaFileType.MOSTLY_Q8_0: LogitLimits(0.01, 0.95),
    LlamaFileType.MOSTLY_Q6_K: LogitLimits(0.01, 0.95),
    LlamaFileType.MOSTLY_Q5_K_M: LogitLimits(0.02, 0.90),
    LlamaFileType.MOSTLY_Q5_K_S: LogitLimits(0.02, 0.90),
    LlamaFileType.MOSTLY_Q4_K_M: LogitLimits(0.05, 0.85),
    LlamaFileType.MOSTLY_Q4_K_S: LogitLimits(0.05, 0.85),
}
_COARSE_LIMITS = LogitLimits(0.2, 0.6)


def verify(config: Config, inputs: dict[str, Path], out_dir: Path) -> Verification:
    """Stage: compare the exported files with base + adapter, write verification.json, or raise GateFailed.

    Logits are compared for the most exact tuned file; vocabulary and template for every file.
    """
    from pipeline.base_model import local_base
    from pipeline.prepare import EVAL_FILE, load_examples

    exported = Artifact.load(inputs["export"], ExportedModels).result
    exact_first = sorted(
        exported.files,
        key=lambda file: (file.role != "tuned", -file.bits_per_weight, file.quantization == "BF16"),
    )
    first, *others = [inputs["export"] / file.name for file in exact_first]
    reference = Reference(local_base(config.model.base, config.model.revision), inputs["train"], config.prompt.system)
    conversations = load_examples(inputs["prepare"] / EVAL_FILE)[: config.verify.prompts]
    result = _verify(first, reference, conversations, config.verify, others)
    write_json(out_dir / RESULT_NAME, result.model_dump(mode="json"))
    raise_if_failed(result)
    return result


def verify_gguf(
    gguf: Path,
    base: Path,
    adapter: Path | None,
    conversations: Sequence[Example],
    thresholds: VerifyConfig,
    system: str | None = None,
) -> Verification:
    """Compare one GGUF with the model it should be; ``base`` is a local folder. Differences are told.

    Thresholds are for files without quantization; quantized ones have limits of their own by type.
    """
    return _verify(gguf, Reference(base, adapter, system), conversations, thresholds, [])


def raise_if_failed(result: Verification) -> None:
    """Raise GateFailed naming the first failed check."""
    failed = [check for check in result.checks if not check.passed]
    if failed:
        others = f" ({len(failed) - 1} more checks failed)" if len(failed) > 1 else ""
        raise GateFailed(f"The GGUF is not the trained model: {failed[0].name}: {failed[0].detail}{others}")


class Reference:
    """What trained: tokenizer, template, and base + adapter in 32 bit."""

    def __init__(self, base: Path, adapter: Path | None, system: str | None) -> None:
        from pipeline.base_model import load_tokenizer
        from pipeline.vocabulary import TransformersVocabulary

        self._base = base
        self._adapter = adapter
        self._system = system
        self._tokenizer = load_tokenizer(tokenizer_folder(base, adapter))
        self._vocabulary = TransformersVocabulary(self._tokenizer)
        self._chat_format = ChatFormat(self._tokenizer.chat_template, self._vocabulary, system)

    def request(self, gguf: Path, examples: Sequence[Example]) -> Request:
        """Everything the child is asked; the logits are asked for the ids of this side."""
        return Request(
            gguf=gguf.absolute(),
            system=self._system,
            texts=[*STRESS_TEXTS, *control_token_texts(sorted(self._vocabulary.control_tokens))],
            conversations=_conversations(examples),
            examples=[
                ReferenceExample(question=each.question, reasoning=each.reasoning, answer=each.answer)
                for each in examples
            ],
            evaluate=[self._chat_format.encode(each).input_ids[:_MAX_POSITIONS] for each in examples],
        )

    def view(self, request: Request, size: int) -> VocabularyView:
        return vocabulary_view(
            request,
            self._vocabulary,
            self._chat_format,
            size,
            [self._tokenizer(text, add_special_tokens=False).input_ids for text in request.texts],
            [self._render(conversation) for conversation in request.conversations],
        )

    def load_model(self) -> Any:
        """Base + adapter in float32, the adapter not merged, so that merging is checked too."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        if self._adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self._adapter)
        return model.eval()

    def _render(self, conversation: Conversation) -> str | None:
        import jinja2

        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation.messages,
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
            )
        except jinja2.TemplateError:
            return None
        return text


def _conversations(examples: Sequence[Example]) -> list[Conversation]:
    """The held-out questions, and shapes of conversation that templates treat apart."""
    user = {"role": "user", "content": "Is 5 mg enough?"}
    answer = {"role": "assistant", "content": "<think>\nProbably.\n</think>\n\nYes, it is."}
    system = {"role": "system", "content": "You are a careful physician."}
    shapes = [[user], [user, answer], [user, answer, user], [system, user], [system, user, answer, user]]
    shapes += [[{"role": "user", "content": each.question}] for each in examples]
    return [
        Conversation(messages=messages, add_generation_prompt=prompt) for messages in shapes for prompt in (True, False)
    ]


def _verify(
    gguf: Path,
    reference: Reference,
    examples: Sequence[Example],
    thresholds: VerifyConfig,
    others: Sequence[Path],
) -> Verification:
    if not examples:
        raise MedcotError("There is no conversation to compare logits on: give at least one held-out record.")
    request = reference.request(gguf, examples)
    with tempfile.TemporaryDirectory(prefix="medcot-verify-") as folder:
        answer = _ask(request, Path(folder))
        if isinstance(answer, str):
            return _result([Check(name="loads", passed=False, detail=answer)])
        view = reference.view(request, answer.view.size)
        checks = [
            Check(name="loads", passed=True, detail=f"llama.cpp loads {gguf.name} in a child process"),
            *_vocabulary_checks(request, view, answer),
            *(_other_file(request, view, other) for other in others),
        ]
        return _compare_logits(checks, request, answer, Path(folder), reference, thresholds)


def _result(checks: list[Check], nmse: float = 1.0, top1: float = 0.0, positions: int = 0) -> Verification:
    """Without positions nothing was compared, and the numbers are those of unrelated logits."""
    return Verification(
        checks=checks,
        logit_nmse=nmse,
        top1_agreement=top1,
        positions=positions,
        passed=all(check.passed for check in checks),
    )


def _ask(request: Request, folder: Path) -> Answer | str:
    """Run the child; its answer, or the sentence that says why there is none."""
    (folder / REQUEST_NAME).write_text(request.model_dump_json(), encoding="utf-8")
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            [sys.executable, "-m", "export.verify_probe", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_PROBE_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"llama.cpp did not finish with {request.gguf} in {_PROBE_TIMEOUT_SECONDS // 60} minutes."
    if child.returncode == 0:
        return Answer.model_validate_json((folder / ANSWER_NAME).read_bytes())
    last_words = next(reversed(child.stderr.decode(errors="replace").strip().splitlines()), "no message")
    if child.returncode < 0:
        return f"llama.cpp died (signal {-child.returncode}) on {request.gguf}: {last_words}"
    return f"llama.cpp cannot use {request.gguf}: {last_words}"


def _other_file(request: Request, view: VocabularyView, gguf: Path) -> Check:
    """One check for a further file of the same export: it loads, and has the same vocabulary and template."""
    with tempfile.TemporaryDirectory(prefix="medcot-verify-") as folder:
        answer = _ask(request.model_copy(update={"gguf": gguf.absolute(), "evaluate": []}), Path(folder))
    name = f"vocabulary of {gguf.name}"
    if isinstance(answer, str):
        return Check(name=name, passed=False, detail=answer)
    failed = next((check for check in _vocabulary_checks(request, view, answer) if not check.passed), None)
    if failed:
        return Check(name=name, passed=False, detail=f"{failed.name}: {failed.detail}")
    return Check(name=name, passed=True, detail="loads; token ids, templates, BOS and EOS are equal")


def _vocabulary_checks(request: Request, view: VocabularyView, answer: Answer) -> list[Check]:
    ours, theirs = view, answer.view
    texts = request.texts
    checks = []
    # llama.cpp puts a space in front of the text after every control token, and before one that is there; the
    # tokenizers library does neither. The pipeline encodes piece by piece (pipeline/prompts.py), so with
    # SentencePiece the pieces are compared; those that begin with a space, only as they go on from text.
    pieces_only = answer.tokenizer_model == "llama"
    starts = [index for index, text in enumerate(texts) if not (pieces_only and text.startswith((" ", "▁")))]
    if pieces_only:
        checks.append(Check(name="token ids: whole texts", passed=True, detail="SentencePiece: compared in pieces"))
    else:
        checks.append(_ids_check("whole texts", texts, ours.whole, theirs.whole))
    checks.append(
        _ids_check(
            "texts at the start",
            [texts[index] for index in starts],
            *([side.segments[index].at_start for index in starts] for side in (ours, theirs)),
        )
    )
    checks.append(
        _ids_check("texts that go on", texts, *([s.after_text for s in side.segments] for side in (ours, theirs)))
    )
    questions = [each.question for each in request.examples]
    checks.append(_ids_check("training prompts", questions, ours.example_ids, theirs.example_ids))
    checks.append(_template_check(request, ours, theirs))
    checks.append(_special_token_check(ours, theirs, answer.eos_ends_generation))
    return checks


def _ids_check(name: str, texts: Sequence[str], ours: list[list[int]], theirs: list[list[int]]) -> Check:
    for text, expected, found in zip(texts, ours, theirs, strict=True):
        if expected != found:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
            at = min(len(expected), len(found)) if at is None else at
            window = slice(max(0, at - 1), at + _SHOWN_IDS)
            where = f"{text[:60]!r}, from token {window.start} on"
            detail = f"{where}, becomes {found[window]}, in training {expected[window]}"
            return Check(name=f"token ids: {name}", passed=False, detail=detail)
    total = sum(map(len, ours))
    return Check(name=f"token ids: {name}", passed=True, detail=f"{total} ids of {len(texts)} texts are equal")


def _template_check(request: Request, ours: VocabularyView, theirs: VocabularyView) -> Check:
    name = "rendered templates"
    for conversation, expected, found in zip(request.conversations, ours.rendered, theirs.rendered, strict=True):
        if expected != found:
            roles = ", ".join(message["role"] for message in conversation.messages)
            return Check(name=name, passed=False, detail=f"({roles}) {_first_difference(expected, found)}")
    return Check(name=name, passed=True, detail=f"{len(ours.rendered)} conversations are equal")


def _first_difference(expected: str | None, found: str | None) -> str:
    if expected is None or found is None:
        refusing = "training" if expected is None else "the GGUF"
        return f"the template of {refusing} refuses the conversation, the other one does not"
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    at = min(len(expected), len(found)) if at is None else at
    start = max(0, at - 20)
    return f"reads {found[start : at + 40]!r} at character {at}, in training {expected[start : at + 40]!r}"


def _special_token_check(ours: VocabularyView, theirs: VocabularyView, eos_ends_generation: bool) -> Check:
    name = "BOS and EOS"
    for label, get in _SPECIAL_FACTS:
        if get(ours) != get(theirs):
            return Check(name=name, passed=False, detail=f"{label} is {get(theirs)!r}, in training {get(ours)!r}")
    if not eos_ends_generation:
        return Check(name=name, passed=False, detail=f"llama.cpp does not stop at {theirs.eos_token!r}")
    added = "added" if theirs.adds_bos else "not added"
    return Check(name=name, passed=True, detail=f"BOS {theirs.bos_token!r} is {added}, EOS {theirs.eos_token!r} stops")


_SPECIAL_FACTS: tuple[tuple[str, Callable[[VocabularyView], object]], ...] = (
    ("EOS", lambda view: view.eos_token),
    ("the id of EOS", lambda view: view.eos_id),
    ("adding BOS", lambda view: view.adds_bos),
    ("BOS", lambda view: view.bos_token if view.adds_bos else None),
)


def _compare_logits(
    checks: list[Check],
    request: Request,
    answer: Answer,
    folder: Path,
    reference: Reference,
    thresholds: VerifyConfig,
) -> Verification:
    import torch

    limits = _limits(answer.file_type, thresholds)
    model = reference.load_model()
    difference = power = 0.0
    agreeing = positions = 0
    for index, ids in enumerate(request.evaluate):
        found = np.load(logits_path(folder, index), mmap_mode="r")
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        if expected.shape != found.shape:
            detail = f"{found.shape[1]} logits a position, the model has {expected.shape[1]}"
            return _result([*checks, Check(name="logits", passed=False, detail=detail)])
        part = _logit_sums(expected, found)
        difference, power, agreeing = difference + part[0], power + part[1], agreeing + part[2]
        positions += len(ids)
    nmse, top1 = difference / power, agreeing / positions
    if not np.isfinite(nmse):
        return _result([*checks, Check(name="logits", passed=False, detail="the logits are not finite")])
    checks = [
        *checks,
        Check(
            name="logit error",
            passed=nmse < limits.max_nmse,
            detail=f"normalized square error {nmse:.3g}, limit {limits.max_nmse:g}, {positions} positions",
        ),
        Check(
            name="top-1 agreement",
            passed=top1 >= limits.min_top1,
            detail=f"{agreeing} of {positions} positions ({top1:.2%}), limit {limits.min_top1:.2%}",
        ),
    ]
    return _result(checks, nmse, top1, positions)


def _limits(file_type: int, thresholds: VerifyConfig) -> LogitLimits:
    if file_type in _WITHOUT_LOSS:
        return LogitLimits(thresholds.max_logit_nmse, thresholds.min_top1_agreement)
    return _QUANTIZED_LIMITS.get(LlamaFileType(file_type), _COARSE_LIMITS)


def _logit_sums(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> tuple[float, float, int]:
    """Squared difference, squared reference, and the number of positions with the same most likely token."""
    difference = power = 0.0
    agreeing = 0
    for a, b in zip(expected, found, strict=True):
        wide = a.astype(np.float64)
        difference += float(np.square(wide - b).sum())
        power += float(np.square(wide).sum())
        agreeing += int(a.argmax() == b.argmax())
    return difference, power, agreeing
