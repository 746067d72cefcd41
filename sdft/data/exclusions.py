"""Images that a file names are left out of a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdft.data.error_messages import join_problems
from sdft.data.packed_strings import printable
from sdft.data.source import Source
from sdft.data.sources.splits import Subset
from sdft.errors import UserError, did_you_mean


def without(sources: Sequence[Source], file: str, whole: bool = True) -> list[Source]:
    """The sources without the images that a text file names, one key a line; lines that begin with # are comments,
    unless they are the key of an image.

    whole: whether the sources are a whole set, in which every name has to occur. Raises UserError if one does not.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"data.exclude={file}: cannot be read ({error.strerror})") from error
    written = {line.rstrip("\r") for line in lines if line.strip()}
    names = {line for line in written if not line.startswith("#")}
    if len(names) < len(written):
        names |= written & {key for source in sources for key in source.keys if key.startswith("#")}
    left: list[Source] = []
    seen: set[str] = set()
    for source in sources:
        here = {named for key in source.keys if (named := name_in(key, names))}
        seen |= here
        keep = [index for index, key in enumerate(source.keys) if not name_in(key, names)]
        left.append(Subset(source, keep) if here else source)
    if whole and (unknown := sorted(names - seen)):
        keys = [printable(key) for source in sources for key in source.keys]
        hint = did_you_mean(unknown[0], keys)
        raise UserError(f"data.exclude={file}: names images that are not here: {join_problems(unknown)}{hint}")
    if not all(len(source.keys) for source in left):
        raise UserError(f"data.exclude={file}: leaves no image to train on, or none to validate on")
    return left


def name_in(key: str, names: set[str]) -> str | None:
    """The name by which a file excludes a key: as it is, as it is printed, or without the number of a repeat."""
    return next((name for name in (key, printable(key), key.rpartition("#")[0]) if name and name in names), None)
