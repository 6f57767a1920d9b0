"""What each stage measured: the ``result`` part of its manifest, and the only thing the report reads.

Units are in the names (seconds, bytes, tokens per second); a rate or a share is between 0 and 1.
"""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.metrics import MetricKey

EngineName = Literal["llama.cpp", "transformers"]
Verdict = Literal["better", "worse", "higher", "lower", "no difference shown", "too few records"]


class Measurement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Histogram(Measurement):
    """Counts in bins of ``width``, the first from ``start`` on; every bin includes its lower edge only."""

    start: int
    width: int
    counts: list[int]


class Distribution(Measurement):
    """Order statistics and histogram of a count per record (words or tokens)."""

    n: int
    minimum: float
    median: float
    p95: float
    maximum: float
    histogram: Histogram


class Leakage(Measurement):
    """What training records give away of held-out ones: common 8-grams of words in question and answer."""

    policy: Literal["drop", "keep"] = Field(description="Whether leaking training records were left out.")
    overlap: float = Field(description="A record leaks that has at least this share of a held-out record's 8-grams.")
    leaking_records: int
    held_out_given_away: int = Field(description="Held-out records that a leaking record was found for.")
    held_out_sharing_an_8_gram: int = Field(description="Held-out records with any 8-gram in the training set used.")


class PreparedData(Measurement):
    """The prepare stage: ``read == train_rows + eval_rows + unused_rows + rejected``."""

    source: str
    read: int
    train_rows: int
    eval_rows: int
    unused_rows: int
    rejected: int
    reject_reasons: dict[str, int]
    repaired: dict[str, int] = Field(description="Usable records that a kind of repair changed.")
    cut_rows: int = Field(description="Records whose reasoning was shortened to fit the context.")
    truncated_rows: int = Field(0, description="Records cut off at model.max_seq_length, end of turn included.")
    truncated_eval_rows: int = Field(0, description="Those of them that are held out.")
    repeated_questions: int = Field(description="Records with an earlier one's question, dropped or not.")
    near_duplicates: int = Field(description="Records nearly equal to an earlier one, dropped or not.")
    leakage: Leakage
    with_reasoning: int
    with_options: int
    words: dict[Literal["question", "reasoning", "answer"], Distribution]
    tokens: dict[Literal["prompt", "thought", "answer", "whole"], Distribution]
    template_sha256: str


class LossPoint(Measurement):
    step: int
    loss: float


class TrainedAdapter(Measurement):
    """The train stage; losses are mean negative log-likelihood per labelled token (nats)."""

    base: str
    steps: int
    trainable_parameters: int
    total_parameters: int
    train_loss: list[LossPoint]
    eval_loss_before: float
    eval_loss_after: float
    tokens_per_second: float = Field(description="Prompt and completion tokens, without padding.")
    train_seconds: float = Field(description="Time in the training loop, over all sessions of a resumed run.")
    resumed_from_step: int | None
    device: str
    dtype: str
    load_in_4bit: bool
    finished: bool = Field(
        default=True, description="False when training.max_minutes ended it: the next run goes on from ``steps``."
    )
    planned_steps: int | None = Field(default=None, description="Steps that the configuration asks for.")
    stopped_early: bool = Field(default=False, description="Whether training.patience ended it.")
    kept_step: int | None = Field(default=None, description="The step whose adapter this is: the best, or the last.")
    eval_loss: list[LossPoint] = Field(
        default=[], description="On the held-out records; step 0 is the base alone, eval_loss_after is kept_step's."
    )
    batch_size: int | None = Field(default=None, description="Examples per forward pass of one process.")
    gradient_accumulation: int | None = Field(default=None, description="Forward passes per optimizer step.")
    skipped_steps: int = Field(
        default=0, description="Of ``steps``, those that the gradient scaler skipped: they changed no weight."
    )
    gradient_checkpointing: str | None = Field(default=None, description="on or off, and why.")


class ExportedFile(Measurement):
    name: str
    role: Literal["tuned", "base"]
    quantization: str
    size_bytes: int
    bits_per_weight: float
    tensor_types: dict[str, int] = Field(description="Number of tensors of each ggml type.")


class ExportedModels(Measurement):
    """The export stage; ``ship`` is the file name of the GGUF to use."""

    architecture: str
    parameters: int
    adapter_matrices_merged: int
    ship: str
    base: str | None = Field(description="File name of the base in the shipped type.")
    adapter_gguf: str | None = Field(
        default=None, description="File name of the adapter alone, for llama.cpp's --lora."
    )
    warnings: list[str] = Field(default=[], description="What the user should know before trusting the files.")
    files: list[ExportedFile]


class Check(Measurement):
    """One comparison: passed, and the sentence that says what was compared and found."""

    name: str
    passed: bool
    detail: str


class FileComparison(Measurement):
    """One GGUF's next-token predictions against ``reference`` on held-out conversations.

    KL is the Kullback-Leibler divergence of the file from the reference (nats a token). ``tensor_error`` is
    |a - b| / |a| of ``worst_tensor`` against the most exact file; None for that file itself and for the base.
    """

    name: str
    quantization: str
    reference: str
    positions: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    max_mean_kl: float | None = Field(description="Limit; None for unquantized files, whose squared error is limited.")
    min_top1: float
    worst_tensor: str | None = None
    tensor_error: float | None = None


class Verification(Measurement):
    """``logit_nmse`` and ``top1_agreement`` are those of the most exact file, over ``positions``."""

    checks: list[Check]
    logit_nmse: float = Field(description="Against base + adapter in 32 bit: |a-b|^2 / |a|^2 over all logits.")
    top1_agreement: float
    positions: int
    passed: bool
    files: list[FileComparison] = Field(default=[], description="The most exact file first.")


class Estimate(Measurement):
    """A mean or rate over ``n`` records with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class CalibrationBin(Measurement):
    """Multiple-choice records whose likeliest option has a probability above ``low``, up to ``high``."""

    low: float
    high: float
    records: int
    confidence: float | None = Field(description="Mean probability of the likeliest option; None without records.")
    accuracy: float | None


class ModelEvaluation(Measurement):
    """One model on the held-out records, greedy decoding; ``pipeline/metrics.py`` names the metrics.

    Answers are held against the reference answer, without the thought.
    """

    model: str
    role: Literal["tuned", "base"]
    engine: EngineName = Field(
        default="llama.cpp",
        description="What wrote the answers: llama.cpp from the file, or base and adapter under transformers. A GGUF's "
        "likelihoods are always llama.cpp's.",
    )
    answer_perplexity: Estimate | None = Field(
        description="Token-weighted, given the reference reasoning; None where every record is cut off before it."
    )
    reasoning_perplexity: Estimate | None = Field(description="Token-weighted; None without reasoning.")
    well_formed: Estimate | None = Field(
        description="Exactly one closed thought, then a non-empty answer; None where the time limit left no answers."
    )
    finished: Estimate | None = Field(description="The model ended its turn itself: not truncated.")
    mean_new_tokens: float = Field(description="0 where the time limit left no answers.")
    perplexity: Estimate | None = Field(default=None, description="Of reasoning and answer; token-weighted.")
    rouge_1: Estimate | None = Field(default=None, description="Mean F-measure of single words, 0 to 1.")
    rouge_2: Estimate | None = Field(default=None, description="Mean F-measure of pairs of words, 0 to 1.")
    rouge_l: Estimate | None = Field(default=None, description="Mean F-measure of common subsequences, 0 to 1.")
    bleu_4: Estimate | None = Field(default=None, description="Of all answers together, 0 to 1.")
    closed_thought: Estimate | None = Field(default=None, description="Exactly one thought, closed.")
    answered: Estimate | None = Field(default=None, description="Something is written outside of thoughts.")
    truncated: Estimate | None = Field(default=None, description="The limit of new tokens was reached.")
    looping: Estimate | None = Field(default=None, description="The output ends in a repeated cycle.")
    thought_tokens: Estimate | None = Field(default=None, description="Mean over outputs that have a thought.")
    new_tokens: Estimate | None = Field(default=None, description="Mean over all outputs.")
    choice_accuracy: Estimate | None = Field(
        default=None, description="Multiple choice: the right letter is the likeliest after a closed thought."
    )
    calibration_error: Estimate | None = Field(default=None, description="Of choice_accuracy, over ``calibration``.")
    brier_score: Estimate | None = Field(default=None, description="Squared error of all options' probabilities.")
    generative_accuracy: Estimate | None = Field(
        default=None, description="Multiple choice: the model's own answer names the right option; none named is wrong."
    )
    unextracted: Estimate | None = Field(default=None, description="The model's own answer names no option, or two.")
    choice_chance: float | None = Field(default=None, description="Accuracy that guessing reaches on these records.")
    choice_own_thoughts: int | None = Field(
        default=None, description="Multiple-choice records that were scored after a thought of the model's own."
    )
    calibration: list[CalibrationBin] = []


class Comparison(Measurement):
    """A model's metric minus the reference model's on the same ``n`` records, with its 95 % interval.

    Rates: Newcombe's interval and McNemar's exact test, a verdict needs both; else a paired bootstrap over records.
    """

    model: str
    reference: str
    metric: MetricKey
    n: int
    difference: float
    low: float
    high: float
    p_value: float | None = Field(default=None, description="McNemar's exact test, two-sided; rates only.")
    verdict: Verdict


class GateOutcome(Measurement):
    """One condition of ``evaluation.gates`` and the sentence that says what was found."""

    model: str
    metric: MetricKey
    condition: str
    passed: bool
    detail: str


class Sample(Measurement):
    """``kind`` is reference for the questions that every evaluation asks; ``heading`` is empty for held-out records."""

    question: str
    reference: str
    outputs: dict[str, str] = Field(description="Model file name -> raw output.")
    kind: Literal["held-out", "reference"] = "held-out"
    heading: str = ""


class EvaluationEndedEarly(Measurement):
    """What every model was measured on when the time limit ended the evaluation: the first so many records."""

    minutes: float = Field(description="evaluation.max_minutes")
    records: int = Field(description="Held-out records that were to be measured.")
    scored: int = Field(description="The first records, whose likelihood every model has.")
    answered: int = Field(description="The first records that every model has answered.")

    @property
    def sentence(self) -> str:
        if self.answered == self.records:
            what = "before the reference questions were answered"
        elif self.scored == self.records:
            what = f"after {self.answered:,} of {self.records:,} records; likelihoods are those of all {self.records:,}"
        else:
            what = f"after {self.answered:,} of {self.records:,} records; likelihoods are those of {self.scored:,}"
        return f"Ended {what}: evaluation.max_minutes={self.minutes:g}."


class Evaluation(Measurement):
    """``comparisons`` are of every tuned model with the base."""

    models: list[ModelEvaluation]
    samples: list[Sample]
    comparisons: list[Comparison] = []
    gates: list[GateOutcome] = []
    bleu_signature: str | None = Field(default=None, description="How BLEU-4 was computed, as sacrebleu writes it.")
    engine_reason: str | None = Field(default=None, description="Why this engine wrote the answers, where one chose.")
    ended_early: EvaluationEndedEarly | None = Field(
        default=None, description="Where evaluation.max_minutes ended it; every figure is of the records measured."
    )


class SpeedTest(Measurement):
    """llama-bench's pp (``prompt``: all tokens together) or tg (``generation``: one by one), one value per repeat.

    ``depth`` tokens are in the context beforehand and not timed; sampling is excluded.
    """

    kind: Literal["prompt", "generation"]
    tokens: int
    depth: int
    tokens_per_second: list[float]

    @property
    def name(self) -> str:
        """As llama-bench prints it: ``pp512``, ``tg128 @ d4096``."""
        short = f"{'pp' if self.kind == 'prompt' else 'tg'}{self.tokens}"
        return f"{short} @ d{self.depth}" if self.depth else short

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tokens_per_second)

    @property
    def standard_deviation(self) -> float:
        """Of the sample (n - 1), as llama-bench has it; 0 for one repeat."""
        return statistics.stdev(self.tokens_per_second) if len(self.tokens_per_second) > 1 else 0.0


class LlamaCppSettings(Measurement):
    """How llama.cpp was asked to run."""

    context_tokens: int
    flash_attention: bool
    kv_type: str = Field(description="ggml type of cached keys and values.")
    gpu_layers: int = Field(description="Layers asked to be on the GPU; -1 all of them.")


class AnswerLength(Measurement):
    """Tokens of a thought and of an answer, and where the figures come from."""

    thought_tokens: float
    answer_tokens: float
    source: str


class Energy(Measurement):
    """Joules per generated token, or None with the reason."""

    joules_per_token: float | None
    source: str = Field(description="What was read, or why nothing could be.")


class Speed(Measurement):
    """One model on this machine; every list holds one value per repeat (inter-token latencies: per token)."""

    model: str
    engine: EngineName
    weights: str = Field(description="ggml type or dtype.")
    file_bytes: int | None
    load_seconds: float = Field(description="The file being in the page cache; importing the library excluded.")
    prompt_tokens: int
    prompt_tokens_per_second: list[float]
    generated_tokens: int
    generated_tokens_per_second: list[float]
    time_to_first_token_seconds: list[float]
    peak_memory_bytes: int = Field(description="Largest resident set of the process, mapped weights included.")
    bits_per_weight: float | None = Field(default=None, description="Of the file's tensors.")
    cold_load_seconds: float | None = Field(default=None, description="After the file was dropped from the page cache.")
    cold_load_note: str | None = Field(default=None, description="Why a cold load is missing or not quite cold.")
    deeper: list[SpeedTest] = Field(default=[], description="The same tests with tokens in the context already.")
    inter_token_seconds: list[float] = Field(
        default=[], description="Between one token and the next of real answers, sampled as the chat does."
    )
    peak_gpu_bytes: int | None = Field(default=None, description="None without a GPU.")
    threads: int | None = None
    llama_cpp: LlamaCppSettings | None = None
    bytes_per_token: int | None = Field(
        default=None, description="Weights read for one generated token: all but an untied embedding."
    )
    energy: Energy | None = None
    notes: list[str] = []

    @property
    def tests(self) -> list[SpeedTest]:
        """All speed tests, those with an empty context first."""
        prompt = SpeedTest(
            kind="prompt", tokens=self.prompt_tokens, depth=0, tokens_per_second=self.prompt_tokens_per_second
        )
        generation = SpeedTest(
            kind="generation",
            tokens=self.generated_tokens,
            depth=0,
            tokens_per_second=self.generated_tokens_per_second,
        )
        return [prompt, generation, *self.deeper]

    def seconds_to_answer(self, length: AnswerLength) -> float:
        """What a person waits: time to first token + thought / speed + answer / speed.

        The speed is that of real answers, sampling included, where they had two tokens.
        """
        first = statistics.median(self.time_to_first_token_seconds)
        if self.inter_token_seconds:
            pace = 1 / statistics.fmean(self.inter_token_seconds)
        else:
            pace = statistics.fmean(self.generated_tokens_per_second)
        return first + (length.thought_tokens + length.answer_tokens) / pace


class TokenDivergence(Measurement):
    """One file's next-token predictions against the most exact file's, over one kind of token."""

    tokens: int
    perplexity: Estimate
    mean_kl: Estimate = Field(description="Kullback-Leibler divergence, nats a token.")
    p99_kl: float
    top1_agreement: Estimate = Field(description="Both files find the same token likeliest.")


class FileQuality(Measurement):
    """One quantization on held-out text; of the reference itself the divergence is 0."""

    model: str
    reference: str
    records: int
    whole: TokenDivergence
    reasoning: TokenDivergence | None
    answer: TokenDivergence


class Recommendation(Measurement):
    """The smallest file inside the budgets; ``model`` None where there is none."""

    model: str | None
    reason: str


class MemoryBandwidth(Measurement):
    """A streaming read of an array far larger than the caches, one value per repeat."""

    threads: int
    array_bytes: int
    bytes_per_second: list[float]

    @property
    def best(self) -> float:
        """The fastest repeat: disturbances only ever slow a read down."""
        return max(self.bytes_per_second)


class BenchmarkEndedEarly(Measurement):
    """What the time limit left out of a benchmark."""

    minutes: float = Field(description="bench.max_minutes")
    left_out: list[str] = Field(description="Such as 'quality' or 'tiny-Q8_0.gguf: 3 of 5 repeats'.")

    @property
    def sentence(self) -> str:
        return f"Ended early, bench.max_minutes={self.minutes:g}; left out: {'; '.join(self.left_out)}."


class Benchmark(Measurement):
    machine: str
    threads: int
    models: list[Speed]
    gpu: str | None = None
    versions: dict[str, str] = Field(default={}, description="Libraries, llama.cpp's commit among them.")
    bandwidth: MemoryBandwidth | None = None
    answer_length: AnswerLength | None = None
    quality: list[FileQuality] = Field(default=[], description="The reference first.")
    quality_note: str | None = Field(default=None, description="Why there is no quality, or what to know of it.")
    recommendation: Recommendation | None = None
    ended_early: BenchmarkEndedEarly | None = Field(default=None, description="Where bench.max_minutes ended it.")

    def roofline_share(self, speed: Speed) -> float | None:
        """Weights read a second over what the memory delivers: above 1 where a cache holds them; None on a GPU."""
        if speed.bytes_per_token is None or self.bandwidth is None or speed.peak_gpu_bytes is not None:
            return None
        return statistics.fmean(speed.generated_tokens_per_second) * speed.bytes_per_token / self.bandwidth.best


class Report(Measurement):
    files: list[str]
