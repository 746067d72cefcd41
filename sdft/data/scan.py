"""Looks at every stored picture of a source once, before anything is learned from it."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from sdft.data.dataset import Source
from sdft.data.decode import UnreadableImage, examine
from sdft.data.problems import listed
from sdft.data.scan_cache import ScanCache, ImageFacts
from sdft.data.sources.splits import Subset, stored
from sdft.errors import UserError
from sdft.progress import tqdm

OnUnreadable = Literal["error", "skip"]
T = TypeVar("T")
R = TypeVar("R")
ENOUGH_FOR_A_BAR = 512


@dataclass
class Scan:
    """What is known of the pictures of a source without reading them again."""

    hw_N2: np.ndarray
    """height and width as they are shown; 0 where the source draws its pictures"""
    digests_N32: np.ndarray
    """SHA-256 of the file, as bytes; 0 where there is none"""
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    """position -> (name of the picture, what is wrong with it)"""

    def add(self, place: int, name: str, seen: ImageFacts) -> None:
        """One picture that was looked at."""
        self.digests_N32[place] = np.frombuffer(bytes.fromhex(seen.digest), np.uint8)
        if seen.problem:
            self.problems[place] = (name, seen.problem)
        else:
            self.hw_N2[place] = seen.h, seen.w

    def digest(self, place: int) -> str | None:
        """SHA-256 of a file; None where there is none."""
        return self.digests_N32[place].tobytes().hex() if self.digests_N32[place].any() else None

    def part(self, places: Sequence[int]) -> Scan:
        """The same of some of the pictures."""
        return Scan(self.hw_N2[places], self.digests_N32[places])


def scan(source: Source, record: ScanCache) -> Scan:
    """Reads and decodes every stored picture that `record` does not know."""
    num = len(source.keys)
    found = Scan(np.zeros((num, 2), np.int32), np.zeros((num, 32), np.uint8))
    unknown = array("q")
    for place in range(num):
        picture = stored(source, place)
        if picture is None:
            continue
        if known := record.find(picture.stamp()):
            found.add(place, picture.name, known)
        else:
            unknown.append(place)
    looks = in_threads(partial(_look, source, record), unknown)
    bar = partial(tqdm, desc="reading pictures", unit="picture", disable=len(unknown) < ENOUGH_FOR_A_BAR, leave=False)
    for place, name, stamp, result in bar(looks, total=len(unknown)):
        if isinstance(result, UnreadableImage):
            found.problems[place] = (name, str(result))
        else:
            found.add(place, name, result)
            record.keep(stamp, result)
    record.flush()
    return found


def readable(source: Source, unreadable: OnUnreadable = "error", cache_dir: str | None = None) -> Source:
    """The source without its unreadable pictures; with `error`, any such picture is a UserError.

    cache_dir: where it is remembered what was seen in them; the user's cache folder where that is None.
    """
    ((left, _),), _ = only_readable([source], unreadable, ScanCache(cache_dir))
    return left


def only_readable(
    sources: list[Source], unreadable: OnUnreadable, record: ScanCache
) -> tuple[list[tuple[Source, Scan]], list[tuple[str, str]]]:
    """Each source without what cannot be read, and what that was. With `error`, one UserError names all of it."""
    left: list[tuple[Source, Scan]] = []
    broken: list[tuple[str, str]] = []
    for source in sources:
        found = scan(source, record)
        if found.problems:
            broken += [found.problems[place] for place in sorted(found.problems)]
            good = [place for place in range(len(source.keys)) if place not in found.problems]
            source, found = Subset(source, good), found.part(good)
        left.append((source, found))
    if broken and unreadable == "error":
        raise UserError(f"data: {told(broken)}, or set data.unreadable=skip")
    if not left[0][0].keys:
        raise UserError(f"data: no picture is left to learn from: {told(broken)}")
    if not left[-1][0].keys:
        raise UserError(f"data: none is left of those held out to judge by: {told(broken)}, or raise data.held_out")
    return left, broken


def told(broken: list[tuple[str, str]]) -> str:
    """Pictures that cannot be read, with the reasons, and what to do."""
    if len(broken) == 1:
        ((name, problem),) = broken
        return f"{name} cannot be read as a picture ({problem}); repair or remove it"
    named = listed([f"{name} ({problem})" for name, problem in broken])
    return f"{len(broken)} files cannot be read as pictures: {named}; repair or remove them"


def _look(source: Source, record: ScanCache, place: int) -> tuple[int, str, str | None, ImageFacts | UnreadableImage]:
    """(position, name, stamp, what is seen). Bytes that cannot be had are Unreadable, and perhaps there next time."""
    picture = stored(source, place)
    assert picture is not None, "only stored pictures are looked at"
    stamp = picture.stamp()
    try:
        content = picture.content()
    except UnreadableImage as error:
        return place, picture.name, stamp, error
    digest = hashlib.sha256(content).hexdigest()
    if known := record.find(digest):
        return place, picture.name, stamp, known
    try:
        return place, picture.name, stamp, ImageFacts(digest, *examine(content), "")
    except UnreadableImage as error:
        return place, picture.name, stamp, ImageFacts(digest, 0, 0, str(error))


def in_threads(function: Callable[[T], R], items: Iterable[T], ahead: int = 32) -> Iterator[R]:
    """`function` of every item, in order, some items ahead: decoders leave the processor to other threads."""
    waiting: deque = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
