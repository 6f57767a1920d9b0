"""Whether the GGUFs say what the trained model says."""

from __future__ import annotations

from bench.page import Section, Table, percent
from pipeline.results import FileComparison, Verification


def verification_section(verification: Verification | None) -> Section | None:
    if verification is None:
        return None
    rows = tuple((check.name, "passed" if check.passed else "FAILED", check.detail) for check in verification.checks)
    passed = all(check.passed for check in verification.checks)
    caption = f"All {len(rows)} checks passed" if passed else "Checks"
    checks = Table(("Check", "Result", "What was found"), "lll", rows, caption=caption, folded=passed)
    predictions = (_predictions_table(verification.files),) if verification.files else ()
    return Section("Verification", tables=(*predictions, checks))


def _predictions_table(files: list[FileComparison]) -> Table:
    def row(file: FileComparison) -> tuple[str, ...]:
        return (
            file.name,
            file.quantization,
            file.reference,
            f"{file.mean_kl:.2g}",
            "" if file.max_mean_kl is None else f"{file.max_mean_kl:.2g}",
            f"{file.p99_kl:.2g}",
            percent(file.top1_agreement),
            percent(file.min_top1),
            f"{file.positions:,}",
            "" if file.tensor_error is None else f"{file.worst_tensor}: {file.tensor_error:.2g}",
        )

    header = (
        "File", "Type", "Compared with", "Mean KL", "Limit", "99th percentile", "Same likeliest token", "Limit",
        "Positions", "Weights farthest off",
    )  # fmt: skip
    note = (
        "Predictions of the next token on held-out conversations. KL is the Kullback-Leibler divergence from what the "
        "file is compared with (nats a token), 0 for equal predictions; files without quantization have a limit on the "
        "squared error of their logits instead, among the checks. Weights: the tensor nearest to its limit, its "
        "root-mean-square error as a share of its size."
    )
    return Table(header, "lllrrrrrrl", tuple(map(row, files)), note)
