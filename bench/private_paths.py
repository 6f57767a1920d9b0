"""Folders of a machine in texts that are to be published: a path is shortened to its last component.

What names a folder: this machine's own (home, working folder, caches), the paths in the run's configuration, and the
places where Kaggle, Colab and most systems keep people's files, since a run may have been made on another machine.
"""

from __future__ import annotations

import copy
import html
import re
import tempfile
from pathlib import Path
from typing import Any

from bench.run_folder import Run, StageState
from pipeline.base_model import PACKAGE_PREFIX
from pipeline.cache import cache_dir
from pipeline.config import Config

_OTHER_MACHINES = (r"/home/[^/\s]+", r"/Users/[^/\s]+", "/root", "/kaggle", "/content")
_LEAST_BYTES = 8  # of a path that is looked for among the bytes of weights
_REST = r"(?:/[^\s\"'`<>|,;:)\]]*)?"


def public_name(name: str) -> str:
    """A name without the folders above it, where it is a path of this machine."""
    is_path = name.startswith(("/", ".", "~")) or (name.count("/") > 1 and not name.startswith(PACKAGE_PREFIX))
    return Path(name).name if is_path else name


class PrivatePaths:
    """The folders that must not be named, for a run in ``run_dir``."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        given = (config.model.base, config.data.source, config.export.imatrix)
        # As they were written; longest first, since one may begin with another.
        self._given = sorted((name for name in given if public_name(name) not in ("", name)), key=len, reverse=True)
        own = {Path.home(), Path.cwd(), run_dir, run_dir.resolve(), cache_dir(), Path(tempfile.gettempdir())}
        self._folders = sorted({str(path) for path in own if path.is_absolute() and path != Path("/")}, reverse=True)
        # "/root" alone may be a token of a vocabulary, and weights hold any few bytes somewhere.
        self._told_apart = [
            path
            for path in (*self._given, *self._folders)
            if path.startswith("/") and path.count("/") > 1 and len(path) >= _LEAST_BYTES
        ]
        roots = "|".join([*map(re.escape, self._folders), *_OTHER_MACHINES])
        # Not inside a longer path or an address (https://host/home/page names no folder), and not </root>, a tag's end.
        self._path = re.compile(rf"(?<![\w.~/<-])(?:file://)?(?:{roots})(?![\w.-]){_REST}")

    def shortened(self, text: str) -> str:
        for name in self._given:
            text = re.sub(rf"(?<![\w.~/-]){re.escape(name)}(?![\w-])", lambda match: public_name(match[0]), text)
        return self._path.sub(lambda match: Path(match[0]).name, text)

    def shorten_all(self, value: Any) -> Any:
        """The same JSON value with every text in it shortened, keys included."""
        if isinstance(value, str):
            return self.shortened(value)
        if isinstance(value, list):
            return [self.shorten_all(each) for each in value]
        if isinstance(value, dict):
            return {self.shortened(key): self.shorten_all(each) for key, each in value.items()}
        return value

    def config(self, config: Config) -> Config:
        return Config.model_validate(self.shorten_all(config.model_dump(mode="json")))

    def run(self, run: Run) -> Run:
        """The run as a report may tell of it to anyone: results and reasons shortened, manifests as they are."""
        public = copy.copy(run)
        for name in ("prepared", "trained", "exported", "verified", "evaluated", "benchmarked"):
            result = getattr(run, name)
            if result is not None:
                setattr(public, name, type(result).model_validate(self.shorten_all(result.model_dump(mode="json"))))
        public.states = {
            stage: StageState(state.name, self.shortened(state.reason)) for stage, state in run.states.items()
        }
        return public

    def named_in(self, content: bytes) -> str | None:
        """A folder that is named in a file's bytes as they are."""
        return next((folder for folder in self._told_apart if folder.encode() in content), None)

    def named_in_text(self, text: str) -> str | None:
        """The same for a text, whatever of it HTML or Markdown have escaped."""
        forms = (text, html.unescape(text), text.replace("\\", ""))
        return next(filter(None, (self.named_in(form.encode()) for form in forms)), None)
