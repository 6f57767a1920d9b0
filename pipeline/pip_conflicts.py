"""What pip says of packages that are there beside medcot's, told in one sentence; medcot's own are checked.

    python -m pipeline.pip_conflicts requirements-gpu.txt <pip.stderr

The images of Kaggle and Colab bring hundreds of packages. Where one of them asks for another version of something that
medcot has pinned, pip ends with a red "ERROR: pip's dependency resolver does not currently take into account all the
packages that are installed", though it has installed everything.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

_HEADING = "pip's dependency resolver does not currently take into account"
# https://github.com/pypa/pip/blob/main/src/pip/_internal/commands/install.py (_warn_about_conflicts)
_CONFLICT = re.compile(r"^(\S+) \S+ requires .+, (?:but you(?:'ll)? have .+ incompatible|which is not installed)\.$")


def foreign(said: Sequence[str]) -> tuple[list[str], list[str]]:
    """The packages that pip complains of, and the lines that are about something else."""
    names, rest, heading = set(), [], False
    for line in said:
        found = _CONFLICT.match(line.strip()) if heading else None
        if _HEADING in line:
            heading = True
        elif found:
            names.add(str(canonicalize_name(found[1])))
        else:
            rest.append(line)
    return sorted(names), rest


def unmet(required: Sequence[str]) -> tuple[set[str], list[str]]:
    """All packages that these (and theirs) need, and one line for each that is absent or of another version."""
    checked: set[tuple[str, frozenset[str]]] = set()
    problems: list[str] = []
    waiting = [("medcot", Requirement(line), frozenset({""})) for line in required]
    while waiting:
        by, requirement, extras = waiting.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = str(canonicalize_name(requirement.name))
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{by} needs {requirement.name}{requirement.specifier}, which is not installed")
            continue
        if not requirement.specifier.contains(installed.version, prereleases=True):
            problems.append(f"{by} needs {requirement.name}{requirement.specifier}, {installed.version} is installed")
        wanted = frozenset({"", *requirement.extras})
        if (name, wanted) in checked:
            continue
        checked.add((name, wanted))
        for line in installed.requires or []:
            try:
                waiting.append((name, Requirement(line), wanted))
            except InvalidRequirement:  # of an old package; pip does not read it either
                continue
    return {name for name, _ in checked}, problems


def pinned(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def main(arguments: list[str]) -> None:
    names, rest = foreign(sys.stdin.read().splitlines())
    for line in rest:
        print(line, file=sys.stderr)
    own, problems = unmet(pinned(Path(arguments[0]).read_text(encoding="utf-8")))
    for problem in problems:
        print(f"setup: Warning: {problem}; if a command fails of it, set up again in a fresh session", file=sys.stderr)
    others = [name for name in names if name not in own]
    if others:
        which = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        print(
            f"setup: of the packages that were here before, {len(others)} that medcot does not use ({which}) ask for "
            "other versions than are installed now and may not work in this session; the "
            f"{len(own)} packages that medcot uses have been checked" + ("" if problems else " and fit each other"),
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
