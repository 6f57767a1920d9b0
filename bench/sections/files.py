"""What was made: the GGUFs."""

from __future__ import annotations

from bench.page import Section, Table, byte_size
from pipeline.results import ExportedFile, ExportedModels


def files_section(exported: ExportedModels | None) -> Section | None:
    if exported is None:
        return None

    def row(file: ExportedFile) -> tuple[str, ...]:
        types = ", ".join(f"{count} {name}" for name, count in sorted(file.tensor_types.items()))
        purpose = "ship" if file.name == exported.ship else "base, to compare" if file.role == "base" else ""
        return (
            file.name,
            purpose,
            file.quantization,
            byte_size(file.size_bytes),
            f"{file.bits_per_weight:.2f}",
            types,
        )

    return Section(
        "What was made",
        (
            f"A {exported.architecture} model of {exported.parameters:,} parameters; the adapter changed "
            f"{exported.adapter_matrices_merged} of its matrices.",
        ),
        (
            Table(
                ("File", "Purpose", "Type", "Size", "Bits per weight", "Tensors"),
                "lllrrl",
                tuple(map(row, exported.files)),
            ),
        ),
    )
