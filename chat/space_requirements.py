"""What a Space has to install: the packages of the page, each pinned to the version that is installed here.

Spaces install requirements.txt with pip on Debian's Python image, which has a C compiler.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

from pipeline.errors import MedcotError

# What the page's modules import; the versions of these and of all they need are those they are tested with here.
_DIRECT = (
    "click", "fastapi", "gradio", "huggingface_hub", "jinja2", "llama_cpp_python", "numpy", "psutil", "pydantic",
    "pyyaml", "rich", "uvicorn",
)  # fmt: skip
# llama-cpp-python has no wheel on PyPI, and the CPU wheels of its own index want musl's C library, which Debian has not
# (https://github.com/abetlen/llama-cpp-python/issues/1628, 2118), so it is compiled. The machine that compiles is not
# the one that runs: without GGML_NATIVE it is built for any x86 with AVX2. Multimodal support would double the time.
_BUILD = ("cmake.define.GGML_NATIVE=OFF", "cmake.define.LLAVA_BUILD=OFF")
_LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def requirements_text() -> str:
    """``requirements.txt``; raises MedcotError where a package of the page is not installed."""
    lines = [
        "# The page's packages; llama-cpp-python is compiled, for any x86 CPU with AVX2.",
        *(f"{name}=={version}{_options(name)}" for name, version in sorted(pinned_packages())),
    ]
    return "\n".join(lines) + "\n"


def installed_version(name: str) -> str:
    """Raises MedcotError."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise MedcotError(
            f"{name} is not installed, so its version for the Space is not known: pip install -r requirements-chat.txt."
        ) from error


def pinned_packages() -> Iterator[tuple[str, str]]:
    """(name, version) of the direct packages and all that these need on Linux, as far as it is installed here."""
    from packaging.requirements import Requirement

    seen: dict[str, set[str]] = {}
    pending = [(Requirement(name), True) for name in _DIRECT]
    while pending:
        requirement, is_direct = pending.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in seen and requirement.extras <= seen[name]:
            continue
        is_new = name not in seen
        extras = seen.setdefault(name, set())
        extras |= requirement.extras
        try:
            needed = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            if is_direct:
                installed_version(name)
            continue  # for Linux alone, and this is another system: pip will choose
        if is_new:
            yield name, installed_version(name)
        for each in map(Requirement, needed):
            if each.marker is None or any(each.marker.evaluate({**_LINUX, "extra": e}) for e in extras or {""}):
                pending.append((each, False))


def _options(name: str) -> str:
    return "".join(f' --config-settings="{setting}"' for setting in _BUILD) if name == "llama-cpp-python" else ""
