"""A folder that is a Hugging Face Space: the page of ``medcot serve`` for one GGUF, or for two side by side.

medcot is on no package index, so the folder carries the modules that the page imports. The README's front matter
configures the Space: https://huggingface.co/docs/hub/spaces-config-reference
"""

from __future__ import annotations

import ast
import errno
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jinja2
import yaml
from pydantic import BaseModel, ConfigDict

from chat.space_app import SETTINGS_FILE, SpaceModel, SpaceSettings, read_settings
from chat.space_requirements import PYTHON_VERSION, installed_version, requirements_text
from chat.terminal import open_model
from chat.web_texts import PAGE_DISCLAIMER
from pipeline import __version__
from pipeline.artifacts import sha256_file
from pipeline.errors import MedcotError

APP = "from chat.space_app import main\n\nmain()\n"
GIT_ATTRIBUTES = "*.gguf filter=lfs diff=lfs merge=lfs -text\n"
_ENTRY = ("chat.space_app", "chat.proof", "chat.web")
_PACKAGES = Path(__file__).resolve().parent.parent
_DATA = Path(__file__).with_name("data")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_ID = re.compile(r"[a-z0-9.-]+")  # as in the hub's list; GGUF's general.license is free text
# The free hardware: https://huggingface.co/docs/hub/spaces-overview. Some memory is the system's and the page's.
_MEMORY_BYTES = 16e9
_OTHER_MEMORY_BYTES = 2e9
_REPOSITORY_BYTES = 1e9  # what a Space of a free account may hold; a model repository holds more


class SpaceFolder(BaseModel):
    """What was written. ``file_bytes`` are the GGUFs' in the folder, ``code_bytes`` all others'."""

    model_config = ConfigDict(frozen=True)
    path: Path
    models: tuple[SpaceModel, ...]
    file_bytes: int
    code_bytes: int
    notes: tuple[str, ...]


def write_space(
    folder: Path,
    gguf: Path,
    base: Path | None = None,
    *,
    model_repo: str | None = None,
    title: str | None = None,
    license_id: str | None = None,
    n_ctx: int = 4096,
    max_new_tokens: int = 1024,
    thought_budget: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> SpaceFolder:
    """Write the folder, whole or not at all; one that an earlier call wrote is replaced, its ``.git`` kept.

    With ``model_repo`` the GGUFs are not in the folder: the Space fetches them from there by their names. Raises
    MedcotError for a folder with anything else in it, for files that cannot be used and for a full disk.
    """
    _check_replaceable(folder)
    if model_repo is not None and not _HUB_ID.fullmatch(model_repo):
        raise MedcotError(f"{model_repo!r:.80} is no repository of the hub: write owner/name.")
    paths = [gguf] if base is None else [base, gguf]
    licenses = [_proven_license(path) for path in paths]
    announce("Hashing the models ...")
    models = tuple(_describe(path, name, model_repo) for path, name in zip(paths, _file_names(paths), strict=True))
    title = title or gguf.stem
    with _replacing(folder) as new:
        (new / "README.md").write_text(_readme(title, models, license_id or licenses[-1], model_repo), encoding="utf-8")
        (new / "app.py").write_text(APP, encoding="utf-8")
        (new / "requirements.txt").write_text(requirements_text(), encoding="utf-8")
        (new / ".gitattributes").write_text(GIT_ATTRIBUTES, encoding="utf-8")
        _copy_code(new)
        files = {name: sha256_file(new / name) for name in _names_in(new)}
        settings = SpaceSettings(
            made_by="medcot space",
            models=models,
            n_ctx=n_ctx,
            max_new_tokens=max_new_tokens,
            thought_budget=thought_budget,
            files=files,
        )
        (new / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        code_bytes = sum((new / name).stat().st_size for name in _names_in(new))
        if model_repo is None:
            for path, model in zip(paths, models, strict=True):
                _link_or_copy(path, new / model.file)
    return SpaceFolder(
        path=folder,
        models=models,
        file_bytes=0 if model_repo else sum(model.size_bytes for model in models),
        code_bytes=code_bytes,
        notes=tuple(_notes(models, model_repo, license_id or licenses[-1])),
    )


def page_modules() -> list[Path]:
    """The source files of ours that the page needs, wherever they are imported; relative to the packages' folder."""
    pending = list(_ENTRY)
    found: set[Path] = set()
    while pending:
        module = pending.pop()
        path = _source(module)
        if path is None or path in found:
            continue
        found.add(path)
        package = module.rpartition(".")[0]
        pending += [package] if package else []
        for node in ast.walk(ast.parse((_PACKAGES / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                pending += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


def _source(module: str) -> Path | None:
    """None for a module that is not ours, or no module."""
    name = Path(*module.split("."))
    if name.parts[0] not in ("chat", "export", "pipeline"):
        return None
    candidates = (name.with_suffix(".py"), name / "__init__.py")
    return next((path for path in candidates if (_PACKAGES / path).is_file()), None)


def _copy_code(folder: Path) -> None:
    data = [path.relative_to(_PACKAGES) for path in sorted(_DATA.iterdir()) if path.is_file()]
    for path in [*page_modules(), *data]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGES / path, folder / path)
    (folder / "LICENSE-medcot").write_text(_medcot_license(), encoding="utf-8")


def _medcot_license() -> str:
    """From the source tree, or from what pip installed."""
    in_tree = _PACKAGES / "LICENSE"
    if in_tree.is_file():
        return in_tree.read_text(encoding="utf-8")
    installed = importlib.metadata.distribution("medcot").read_text("licenses/LICENSE")
    return installed or "medcot is under the MIT licence.\n"


def _proven_license(path: Path) -> str | None:
    """What the GGUF says its licence is; raises MedcotError for a file that cannot be chatted with."""
    with open_model(path, 64, 1) as model:
        name = model.metadata.get("general.license", "")
    return name if _LICENSE_ID.fullmatch(name) else None


def _describe(path: Path, file_name: str, repo: str | None) -> SpaceModel:
    return SpaceModel(
        name=Path(file_name).stem,
        file=file_name,
        size_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        repo=repo,
    )


def _file_names(paths: Sequence[Path]) -> list[str]:
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"base-{names[0]}", *names[1:]]


def _readme(title: str, models: Sequence[SpaceModel], license_id: str | None, model_repo: str | None) -> str:
    front_matter = {
        "title": title,
        "emoji": "🩺",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": installed_version("gradio"),
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "suggested_hardware": "cpu-basic",
        "license": license_id,
        "models": [model_repo] if model_repo else None,
        # Fetched while the Space is built, so that a restart need not.
        "preload_from_hub": [f"{model_repo} {','.join(model.file for model in models)}"] if model_repo else None,
    }
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        (_DATA / "space_readme.md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        front_matter=yaml.safe_dump(
            {key: value for key, value in front_matter.items() if value}, sort_keys=False, allow_unicode=True
        ),
        title=title,
        models=models,
        disclaimer=PAGE_DISCLAIMER,
        version=__version__,
    )


def _notes(models: Sequence[SpaceModel], model_repo: str | None, license_id: str | None) -> Iterator[str]:
    total = sum(model.size_bytes for model in models)
    if total > _MEMORY_BYTES - _OTHER_MEMORY_BYTES:
        yield f"The models take {total / 1e9:.1f} GB and the free hardware has 16 GB: take smaller quantizations."
    if model_repo is None and total > _REPOSITORY_BYTES:
        yield (
            f"A Space of a free account holds 1 GB and the models take {total / 1e9:.1f} GB: upload them to a model "
            "repository and name it with --model-repo."
        )
    if license_id is None:
        yield "The GGUF does not say under which licence it is: name the hub's id of it with --license."


def _check_replaceable(folder: Path) -> None:
    """Raises MedcotError for a folder that holds what this did not write, or what was changed since."""
    if folder.is_file():
        raise MedcotError(f"{folder} is a file: name a folder for the Space.")
    names = _names_in(folder)
    if not names:
        return
    if SETTINGS_FILE not in names:
        raise MedcotError(f"{folder} holds other files ({names[0]}): name a new folder, or empty this one.")
    settings = read_settings(folder)
    expected = {SETTINGS_FILE, *settings.files, *(model.file for model in settings.models)}
    strange = [name for name in names if name not in expected]
    changed = [name for name in names if name in settings.files and sha256_file(folder / name) != settings.files[name]]
    if strange or changed:
        what = f"{strange[0]} in it was added" if strange else f"{changed[0]} in it was changed"
        raise MedcotError(f"{folder} would be replaced, and {what} since it was written: move that away first.")


def _names_in(folder: Path) -> list[str]:
    """Files below a folder, Git's own and Python's caches left out; none where there is no folder."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(name) for name in names if not {".git", "__pycache__"} & set(name.parts)]


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end of the block, or leaves nothing behind."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that the rename stays on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        new.mkdir()
        try:
            yield new
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise MedcotError(
                    f"The disk of {folder.parent} is full: free some space; nothing was written."
                ) from error
            raise
        if folder.is_dir():
            if (folder / ".git").exists():
                (folder / ".git").rename(new / ".git")
            folder.rename(Path(beside) / "old")
        new.rename(folder)


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link takes no space; where the disks differ, or the file system has none, a copy."""
    source = source.resolve()
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
    needed, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if free < needed:
        raise MedcotError(
            f"{source.name} takes {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: free some, or leave "
            "the file on the hub with --model-repo."
        )
    shutil.copyfile(source, target)
