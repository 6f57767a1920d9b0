"""What ``medcot publish`` did or would do, for programs and in the terminal."""

from __future__ import annotations

from typing import Literal

import click
from pydantic import Field

from bench.page import byte_size
from bench.published_files import Kind
from pipeline.results import Measurement

FileState = Literal["to send", "sent", "there already", "not known"]
Visibility = Literal["private", "public"]


class PublishedFile(Measurement):
    path: str
    kind: Kind
    size_bytes: int
    sha256: str
    holds_data: bool = Field(description="Whether questions and answers of the data are in it, word for word.")
    state: FileState = Field(description="not known: the repository could not be asked.")


class Publication(Measurement):
    """``bytes_to_send`` counts what was or would be sent; None where that is not known."""

    repository: str
    url: str
    visibility: Visibility
    dry_run: bool
    existed: bool | None = Field(description="Before this call; None where the hub did not tell.")
    commit: str | None = Field(description="The commit with these files; None of a dry run.")
    files: list[PublishedFile]
    total_bytes: int
    bytes_to_send: int | None
    deleted: list[str] = Field(description="Files of an earlier call that no longer belong to the run.")
    left_alone: list[str] = Field(description="Files in the repository that medcot did not write.")
    notes: list[str]


def print_publication(publication: Publication) -> None:
    """The files, what else is in the repository, and how to use it; notes go to standard error."""
    width = max(len(file.path) for file in publication.files)
    for file in publication.files:
        click.echo(f"{file.state:13}  {byte_size(file.size_bytes):>10}  {file.path:{width}}  {file.kind}")
    verb = "would delete" if publication.dry_run else "deleted"
    for path in publication.deleted:
        click.echo(f"{verb:13}  {'':>10}  {path}")
    if publication.left_alone:
        click.echo(f"Left alone, not medcot's: {', '.join(publication.left_alone)}")
    with_data = [file.path for file in publication.files if file.holds_data]
    if with_data:
        click.echo(f"With questions and answers of the data, word for word: {', '.join(with_data)}")
    for note in publication.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(_summary(publication))


def _summary(publication: Publication) -> str:
    total = byte_size(publication.total_bytes)
    where = f"{publication.url} ({publication.visibility})"
    if publication.dry_run:
        sent = "" if publication.bytes_to_send is None else f", {byte_size(publication.bytes_to_send)} to send"
        return f"Nothing was sent. {len(publication.files)} files, {total}{sent}, to {where}"
    if not publication.bytes_to_send and not publication.deleted:
        return f"Everything was there already: {where}"
    return f"Published {len(publication.files)} files, {total}: {where}"
