"""The architecture as a test: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import those to its right. cli.py and run.py compose the stages, so they may name all of them.
ALLOWED = {
    "pipeline": {"pipeline"},
    "export": {"export", "pipeline"},
    "bench": {"bench", "export", "pipeline"},
    "chat": {"chat", "export", "pipeline"},
}
COMPOSITION = {"pipeline/cli.py"}
OURS = set(ALLOWED)


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def source_files() -> list[Path]:
    return sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    if relative in COMPOSITION:
        return
    allowed = ALLOWED[relative.split("/")[0]]
    assert imported_roots(path) & OURS <= allowed


def test_only_the_training_imports_unsloth_and_trl() -> None:
    importers = [str(p.relative_to(ROOT)) for p in source_files() if imported_roots(p) & {"unsloth", "trl"}]
    # The probe measures both without medcot around them.
    assert importers == ["bench/training_probe.py", "pipeline/training/lora_model.py", "pipeline/training/trainer.py"]


def test_the_command_line_imports_nothing_heavy_at_the_top() -> None:
    tree = ast.parse((ROOT / "pipeline/cli.py").read_text(encoding="utf-8"))
    top = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert top <= {"__future__", "json", "os", "sys", "pathlib", "typing", "click", "pipeline", "pipeline.errors"}
