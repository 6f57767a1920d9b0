"""What the figures come from: settings, versions of packages, and hashes of every file."""

from __future__ import annotations

from bench.page import Section, Table
from bench.run_folder import Run


def provenance_section(run: Run) -> Section | None:
    if not run.artifacts:
        return None
    versions = {
        (name, version)
        for artifact in run.artifacts.values()
        for name, version in artifact.manifest.versions.items()
        if version != "absent"
    }
    hashes = tuple(
        (stage, record.path, record.sha256)
        for stage, artifact in run.artifacts.items()
        for record in artifact.manifest.files
    )
    commits = {
        (artifact.manifest.config[name]["hub"], commit)
        for artifact in run.artifacts.values()
        for name, commit in artifact.manifest.commits.items()
    }
    fetched = Table(("Repository", "Commit"), "ll", tuple(sorted(commits)), caption="Fetched from the hub", folded=True)
    return Section(
        "Versions and hashes",
        tables=(
            Table(("Package", "Version"), "ll", tuple(sorted(versions)), caption="Versions of packages", folded=True),
            *([fetched] if commits else []),
            Table(("Stage", "File", "SHA-256"), "lll", hashes, caption="Files and their hashes", folded=True),
        ),
    )
