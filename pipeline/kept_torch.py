"""The PyTorch that a machine brings stays as it is: asked by scripts/setup.sh before and after pip.

    python -m pipeline.kept_torch pin >pins.txt     what is installed, as constraints for pip
    python -m pipeline.kept_torch check pins.txt    exit 1 and one sentence when pip has changed it or CUDA is silent

Standard library and ``pipeline/platforms.py`` alone: nothing else is installed before pip.

A service's PyTorch fits its driver; another one from the index may not see the GPU at all.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from pipeline.platforms import driver_answers

# torchvision and torchaudio are compiled against one version of torch; torch itself pins its CUDA libraries and Triton.
PACKAGES = ("torch", "torchvision", "torchaudio")


def pins() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def what_changed(wanted: list[str]) -> str | None:
    """One sentence when a pinned package is not what it was."""
    now = pins()
    for pin in wanted:
        if pin not in now:
            name, _, version = pin.partition("==")
            there = next((each for each in now if each.startswith(f"{name}==")), f"no {name}")
            return (
                f"pip has put {there} in the place of the machine's own {name} {version}, which requirements-gpu.txt "
                "does not fit: restart the session to have it back."
            )
    return None


def why_no_cuda() -> str | None:
    """One sentence when there is a GPU and PyTorch cannot compute on it."""
    if not driver_answers():
        return None
    import torch

    try:
        torch.ones(2, device="cuda").sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        return f"there is a GPU, and PyTorch {torch.__version__} cannot use it ({reason}): medcot doctor says more."
    return None


def main(arguments: list[str]) -> int:
    if arguments == ["pin"]:
        print("\n".join(pins()))
        return 0
    wanted = Path(arguments[1]).read_text(encoding="utf-8").split()
    problem = what_changed(wanted) or why_no_cuda()
    if problem:
        print(f"Error in setup: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
