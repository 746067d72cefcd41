"""The files below a folder, as people mean them: links are followed, rests of other programs left out and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sdft.data.packed_strings import PackedStrings
from sdft.errors import UserError

SYSTEM_NAMES = {
    "$recycle.bin", "@eadir", "__macosx", "desktop.ini", "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip
"""What operating systems leave beside pictures, besides names that begin with a dot."""

OWN_RECORD = ".sdft_captions.jsonl"
"""What sdft has written to caption files; neither a picture nor left out."""
Identity = tuple[int, int]
"""Device and number of a folder, which all links to it share."""


class Listing:
    """The files below `root` as paths with slashes, sorted.

    Links to folders are followed; a folder that is reached twice, as in a circle of links, is listed once, under its
    own name if it lies below `root`. Left out, and counted: names that begin with a dot, what operating systems leave
    (`Thumbs.db`, `__MACOSX`), and what is no file, such as a pipe or a device, which is never opened. A link to nothing
    is listed: whoever reads it names it.

    Raises UserError for a folder that does not exist or cannot be listed.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"data.root={root}: no such folder")
        self.root = root
        self.left_out, self.never_opened = Counter[str](), set[str]()
        self._own: set[Identity] | None = None
        self._linked: set[Identity] = set()
        self.files = PackedStrings(self._below(str(root), "", linked=False))

    def _below(self, folder: str, name: str, linked: bool) -> Iterator[str]:
        """linked: whether the folder was reached by a link, and may hold folders that are listed otherwise."""
        for entry in entries(folder):
            if entry.name == OWN_RECORD:
                continue
            if entry.name.startswith("."):
                self.left_out["hidden: the name begins with a dot"] += 1
            elif entry.name.lower() in SYSTEM_NAMES:
                self.left_out["left by an operating system"] += 1
            elif entry.is_dir(follow_symlinks=False) and not linked:
                yield from self._below(entry.path, f"{name}{entry.name}/", linked=False)
            elif entry.is_dir():
                if self._is_new(entry):
                    yield from self._below(entry.path, f"{name}{entry.name}/", linked=True)
                else:
                    self.left_out["a link to a folder that is listed already"] += 1
            elif entry.is_file() or not os.path.exists(entry.path):
                yield name + entry.name
            else:
                self.never_opened.add(name + entry.name)
                self.left_out["no file, but a pipe, socket or device"] += 1

    def _is_new(self, folder: os.DirEntry[str]) -> bool:
        """Whether a link, or a folder below one, is a folder that is not listed otherwise."""
        if self._own is None:
            self._own = set(folders_below(str(self.root)))
        identity = identity_of(folder.path)
        if identity in self._own or identity in self._linked:
            return False
        self._linked.add(identity)
        return True

    def lines(self) -> list[str]:
        """What was left out, a line for each reason."""
        return [f"{count} x {reason}" for reason, count in sorted(self.left_out.items())]


def entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder by name. Raises UserError if it cannot be listed."""
    try:
        with os.scandir(folder) as opened:
            return sorted(opened, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"data.root: {folder} cannot be listed ({error.strerror}); check its permissions") from error


def folders_below(folder: str) -> Iterator[Identity]:
    """The folder and those below it, without links."""
    yield identity_of(folder)
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from folders_below(entry.path)


def identity_of(folder: str) -> Identity:
    """What tells a folder from others."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino
