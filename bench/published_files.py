"""Which files of a run are published, under which names, and what is in them.

    README.md            the model card, made for the repository
    NAME-Q4_K_M.gguf     the file that ships, and others that are asked for
    Modelfile            for ollama create; template, system and params say the same to ollama run hf.co/...
    adapter/             the LoRA adapter with its tokenizer and recipe
    report/              the report, made anew without paths of this machine
    medcot-publish.json  what was published, so that a later call knows its own files

Checkpoints, optimizer states, training data and what Weights & Biases keeps are never among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.card_use import Repository
from bench.model_card import model_card
from bench.page import Page
from bench.private_paths import PrivatePaths
from bench.report import build_page, report_texts
from bench.report_document import SCHEMA_NAME, run_report
from bench.run_folder import Run
from export.lora import CONFIG_NAME as ADAPTER_CONFIG
from export.lora import WEIGHTS_NAME as ADAPTER_WEIGHTS
from export.ollama_hub import TEMPLATE_FILE, hub_files
from pipeline.adapter_recipe import RECIPE_NAME
from pipeline.artifacts import FileRecord, left_behind
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.run import stage_named
from pipeline.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_FILES

CARD_PATH = "README.md"
MODELFILE = "Modelfile"
ADAPTER_FOLDER = "adapter"
REPORT_FOLDER = "report"
# What peft, transformers and medcot write into an adapter's folder, and a reader of the adapter needs.
_ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECIPE_NAME, *TOKENIZER_FILES})
# A tokenizer's own file is its vocabulary: large, and with any text among its tokens.
_REWRITTEN = frozenset({ADAPTER_CONFIG, RECIPE_NAME, TOKENIZER_CONFIG})
_HEAD_BYTES = 64 << 20  # a GGUF's metadata with a vocabulary of 128,256 tokens takes about 8 MB

# Bytes; above a limit of its own the hub keeps any file in its storage. Up to here both hashes are made.
_LARGEST_IN_GIT = 32 << 20

Kind = Literal["model card", "model", "adapter", "Ollama", "report", "record"]


@dataclass(frozen=True)
class Upload:
    """A file to publish: a file of the run, with its SHA-256 as the run's manifest has it, or bytes made here."""

    path: str
    kind: Kind
    content: bytes | Path
    size: int
    sha256: str
    holds_data: bool = False  # questions and answers of the data set, word for word

    @classmethod
    def made(cls, path: str, kind: Kind, text: str, *, holds_data: bool = False) -> Upload:
        content = text.encode()
        return cls(path, kind, content, len(content), hashlib.sha256(content).hexdigest(), holds_data)

    @property
    def identities(self) -> tuple[str, ...]:
        """The hashes by which the hub may know the file: SHA-256 of a large one, the blob's name in git of others."""
        if self.size > _LARGEST_IN_GIT:
            return (self.sha256,)
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return (self.sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def run_files(
    config: Config,
    run: Run,
    run_dir: Path,
    repository: str,
    *,
    ggufs: Sequence[str] = (),
    all_ggufs: bool = False,
    adapter: bool = True,
    report: bool = True,
) -> list[Upload]:
    """Every file to publish, in the order in which they are sent: first what cannot be made again quickly.

    ``ggufs`` are names or paths of GGUFs of the run, beside the one that ships. Raises MedcotError where one is not
    the run's, and for a file that names a folder of this machine.
    """
    paths = PrivatePaths(config, run_dir)
    config, run = paths.config(config), paths.run(run)
    models = list(_models(run, run_dir, ggufs, all_ggufs))
    ollama = list(_ollama(run, run_dir))
    where = Repository(
        repository,
        tuple(upload.path for upload in models),
        ADAPTER_FOLDER if adapter else None,
        any(upload.path == TEMPLATE_FILE for upload in ollama),
    )
    page = build_page(config, run)
    uploads = [
        *(_adapter(run, run_dir, paths) if adapter else ()),
        *models,
        *ollama,
        *(_report(config, run, page) if report else ()),
        Upload.made(CARD_PATH, "model card", model_card(config, run, page, where)),
    ]
    for upload in uploads:
        _check_private(upload, paths)
    return uploads


def _models(run: Run, run_dir: Path, wanted: Sequence[str], all_ggufs: bool) -> Iterator[Upload]:
    exported = run.artifacts["export"]
    result = exported.result
    there = [file.name for file in result.files] + ([result.adapter_gguf] if result.adapter_gguf else [])
    names = [result.ship]
    for given in wanted:
        if Path(given).name not in there:
            raise MedcotError(f"--gguf {given}: the run has no such file; it has {', '.join(there)}.")
        names.append(Path(given).name)
    folder, records = run_dir / stage_named("export").folder, _records(run, "export")
    for name in dict.fromkeys(names + (there if all_ggufs else [])):
        if name in left_behind(folder) and not (folder / name).is_file():
            raise MedcotError(f"{folder / name} is not in the copy that this run was resumed from: medcot run --force "
                              "export makes it again.")  # fmt: skip
        yield _file(folder, records, name, name, "model")


def _ollama(run: Run, run_dir: Path) -> Iterator[Upload]:
    path = run_dir / stage_named("export").folder / MODELFILE
    text = _unchanged(path, _records(run, "export").get(MODELFILE)).decode()
    for name, content in {MODELFILE: text, **hub_files(text)}.items():
        yield Upload.made(name, "Ollama", content)


def _adapter(run: Run, run_dir: Path, paths: PrivatePaths) -> Iterator[Upload]:
    folder, records = run_dir / stage_named("train").folder, _records(run, "train")
    for name in sorted(_ADAPTER_FILES & records.keys()):
        upload = _file(folder, records, name, f"{ADAPTER_FOLDER}/{name}", "adapter")
        if name in _REWRITTEN:
            written = json.loads(_unchanged(folder / name, records[name]))
            if (public := paths.shorten_all(written)) != written:
                upload = Upload.made(upload.path, "adapter", json.dumps(public, indent=2, ensure_ascii=False) + "\n")
        yield upload


def _records(run: Run, stage: str) -> dict[str, FileRecord]:
    return {record.path: record for record in run.artifacts[stage].manifest.files}


def _unchanged(path: Path, record: FileRecord | None) -> bytes:
    """A small file's content; raises MedcotError when it is not what the run made."""
    content = path.read_bytes() if path.is_file() else b""
    if record is None or hashlib.sha256(content).hexdigest() != record.sha256:
        raise MedcotError(f"{path} is missing or was changed since the run made it: medcot run makes it again.")
    return content


def _file(folder: Path, records: dict[str, FileRecord], name: str, path: str, kind: Kind) -> Upload:
    record, source = records.get(name), folder / name
    if record is None or not source.is_file() or source.stat().st_size != record.size:
        raise MedcotError(f"{source} is missing or was changed since the run made it: medcot run makes it again.")
    return Upload(path, kind, source, record.size, record.sha256)


def _report(config: Config, run: Run, page: Page) -> Iterator[Upload]:
    # Questions, reference answers and outputs stand side by side in it.
    holds_data = bool(run.evaluated and run.evaluated.samples)
    for name, text in report_texts(page, run_report(config, run, page)).items():
        yield Upload.made(f"{REPORT_FOLDER}/{name}", "report", text, holds_data=holds_data and name != SCHEMA_NAME)


def _check_private(upload: Upload, paths: PrivatePaths) -> None:
    if isinstance(upload.content, bytes):
        folder = paths.named_in_text(upload.content.decode())
    else:
        with upload.content.open("rb") as stream:
            folder = paths.named_in(stream.read(_HEAD_BYTES))
    if folder is not None:
        raise MedcotError(f"{upload.path} names a folder of this machine ({folder}): it is not published like that.")
