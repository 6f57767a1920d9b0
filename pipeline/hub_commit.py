"""Which commit of a hub repository a stage has used, where its configuration names none or a branch.

The commit is noted in the manifest and is no part of the fingerprint: before the first download nobody knows it, and a
fingerprint must not change when it becomes known. Whoever wants it fixed sets model.revision and data.revision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A file that every model has; that of a data set is what `datasets` looks up its commit by.
_LOOKED_UP = {"base": ("config.json", "model"), "records": ("README.md", "dataset")}


def commits_used(identity: Mapping[str, Any]) -> dict[str, str]:
    """From a stage's configuration in its manifest: "base" and "records" -> commit, as far as the hub's cache knows."""
    found = {}
    for name, (file, kind) in _LOOKED_UP.items():
        source = identity.get(name) or {}
        if "hub" in source:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(source["hub"], file, revision=source["revision"], repo_type=kind)
            if isinstance(cached, str):  # .../snapshots/<commit>/<file>
                found[name] = Path(cached).parent.name
    return found
