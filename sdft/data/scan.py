"""Checks that every stored image of a source can be decoded, once, before training."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from sdft.data.decode import UnreadableImage, examine
from sdft.data.error_messages import join_problems
from sdft.data.exclusions import without
from sdft.data.scan_cache import ImageFacts, ScanCache
from sdft.data.source import Source, stored_image
from sdft.data.sources.splits import Subset
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.progress import ENOUGH_FOR_A_BAR, tqdm

OnUnreadable = Literal["error", "skip"]


@dataclass
class Scan:
    """What is known about the images of a source without reading them again."""

    hw_N2: np.ndarray
    """height and width in pixels, after EXIF orientation; 0 for generated images"""
    digests_N32: np.ndarray
    """SHA-256 of the file, as bytes; 0 for generated images"""
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    """index -> (name of the image, why it cannot be decoded)"""

    def add(self, index: int, name: str, facts: ImageFacts) -> None:
        """Enter what was found in one image."""
        self.digests_N32[index] = np.frombuffer(bytes.fromhex(facts.digest), np.uint8)
        if facts.problem:
            self.problems[index] = (name, facts.problem)
        else:
            self.hw_N2[index] = facts.h, facts.w

    def digest(self, index: int) -> str | None:
        """SHA-256 of an image file; None for a generated image."""
        return self.digests_N32[index].tobytes().hex() if self.digests_N32[index].any() else None

    def subset(self, indices: Sequence[int]) -> Scan:
        """The scan of some of the images."""
        return Scan(self.hw_N2[indices], self.digests_N32[indices])


def scan(source: Source, cache: ScanCache) -> Scan:
    """Reads and decodes every stored image that is not in `cache`, with a progress bar."""
    num = len(source.keys)
    found = Scan(np.zeros((num, 2), np.int32), np.zeros((num, 32), np.uint8))
    unknown = array("q")
    for index in range(num):
        image = stored_image(source, index)
        if image is None:
            continue
        if known := cache.find(image.stamp()):
            found.add(index, image.name, known)
        else:
            unknown.append(index)
    results = in_threads(partial(_examine, source, cache), unknown)
    bar = partial(tqdm, desc="checking images", unit="image", disable=len(unknown) < ENOUGH_FOR_A_BAR, leave=False)
    for index, name, stamp, result in bar(results, total=len(unknown)):
        if isinstance(result, UnreadableImage):
            found.problems[index] = (name, str(result))
        else:
            found.add(index, name, result)
            cache.add(stamp, result)
    cache.flush()
    return found


def readable(
    source: Source,
    unreadable: OnUnreadable = "error",
    cache_dir: str | None = None,
    exclude: str | None = None,
    whole: bool = False,
) -> Source:
    """The source without images that cannot be decoded. With `unreadable=error`, raises UserError if there are any.

    cache_dir: folder for the results of scans; the user's cache folder if None. exclude: a text file with the keys of
    images to leave out. whole: whether the source is a whole set, so that every name in that file has to occur.
    """
    if exclude is not None:
        (source,) = without([source], exclude, whole)
    ((left, _),), _ = only_readable([source], unreadable, ScanCache(cache_dir))
    return left


def only_readable(
    sources: list[Source], unreadable: OnUnreadable, cache: ScanCache
) -> tuple[list[tuple[Source, Scan]], list[tuple[str, str]]]:
    """(each source without images that cannot be decoded, with its scan), and (name, problem) of those images.

    Raises UserError naming all of them with `unreadable=error`, and if a source would be empty.
    """
    left: list[tuple[Source, Scan]] = []
    broken: list[tuple[str, str]] = []
    for source in sources:
        found = scan(source, cache)
        if found.problems:
            broken += [found.problems[index] for index in sorted(found.problems)]
            good = [index for index in range(len(source.keys)) if index not in found.problems]
            source, found = Subset(source, good), found.subset(good)
        left.append((source, found))
    if broken and unreadable == "error":
        raise UserError(f"data: {complaint(broken)}, or set data.unreadable=skip")
    if not left[0][0].keys:
        raise UserError(f"data: no image is left to train on: {complaint(broken)}")
    if not left[-1][0].keys:
        raise UserError(f"data: no held-out image is left: {complaint(broken)}, or raise data.held_out")
    return left, broken


def complaint(broken: list[tuple[str, str]]) -> str:
    """Images that cannot be decoded, with the reasons and the remedy."""
    if len(broken) == 1:
        ((name, problem),) = broken
        return f"{name} cannot be read as an image ({problem}); repair or remove it"
    named = join_problems([f"{name} ({problem})" for name, problem in broken])
    return f"{len(broken)} files cannot be read as images: {named}; repair or remove them"


def _examine(source: Source, cache: ScanCache, index: int) -> tuple[int, str, str | None, ImageFacts | UnreadableImage]:
    """(index, name, stamp, facts), or the error instead of facts if the file cannot be read, which is not cached."""
    image = stored_image(source, index)
    assert image is not None, "only stored images are scanned"
    stamp = image.stamp()
    try:
        content = image.content()
    except UnreadableImage as error:
        return index, image.name, stamp, error
    digest = hashlib.sha256(content).hexdigest()
    if known := cache.find(digest):
        return index, image.name, stamp, known
    try:
        return index, image.name, stamp, ImageFacts(digest, *examine(content), "")
    except UnreadableImage as error:
        return index, image.name, stamp, ImageFacts(digest, 0, 0, str(error))
