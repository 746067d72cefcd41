"""Looks at every stored picture of a source once, before anything is learned from it."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from sdft.data.dataset import Source
from sdft.data.decode import Encoded, Unreadable, examine
from sdft.data.problems import listed
from sdft.data.sources.splits import Part, encoded
from sdft.types import UserError

Unreadables = Literal["error", "skip"]
T, R = TypeVar("T"), TypeVar("R")
ENOUGH_FOR_A_BAR = 512


@dataclass
class Scan:
    """What is known of the pictures of a source without reading them again."""

    hw_N2: np.ndarray
    """height and width as they are shown; 0 where the source draws its pictures"""
    digests: dict[int, str] = field(default_factory=dict)
    """position -> SHA-256 of the file"""
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    """position -> (name of the picture, what is wrong with it)"""

    def part(self, places: list[int]) -> Scan:
        """The same of some of the pictures."""
        return Scan(self.hw_N2[places], {i: self.digests[p] for i, p in enumerate(places) if p in self.digests})


def scan(source: Source) -> Scan:
    """Reads and decodes every stored picture."""
    num = len(source.keys)
    found = Scan(np.zeros((num, 2), np.int32))
    if not hasattr(source, "encoded"):
        return found
    looks = in_threads(_look, ((place, encoded(source, place)) for place in range(num)))
    for place, picture, digest, result in tqdm(
        looks, desc="reading pictures", unit="picture", total=num, leave=False, disable=num < ENOUGH_FOR_A_BAR
    ):
        if digest:
            found.digests[place] = digest
        if isinstance(result, Unreadable):
            found.problems[place] = (picture.name, str(result))
        elif result:
            found.hw_N2[place] = result
    return found


def readable(source: Source, unreadable: Unreadables = "error") -> Source:
    """The source without its unreadable pictures; with `error`, any such picture is a UserError."""
    ((left, _),), _ = only_readable([source], unreadable)
    return left


def only_readable(
    sources: list[Source], unreadable: Unreadables
) -> tuple[list[tuple[Source, Scan]], list[tuple[str, str]]]:
    """Each source without what cannot be read, and what that was. With `error`, one UserError names all of it."""
    left, broken = [], []
    for source in sources:
        found = scan(source)
        if found.problems:
            broken += found.problems.values()
            good = [place for place in range(len(source.keys)) if place not in found.problems]
            source, found = Part(source, good), found.part(good)
        left.append((source, found))
    if broken and unreadable == "error":
        raise UserError(f"data: {told(broken)}, or set data.unreadable=skip")
    if any(not source.keys for source, _ in left):
        raise UserError(f"data: no picture is left to learn from, or none held out to judge by, since {told(broken)}")
    return left, broken


def told(broken: list[tuple[str, str]]) -> str:
    """Pictures that cannot be read, with the reasons, and what to do."""
    if len(broken) == 1:
        ((name, problem),) = broken
        return f"{name} cannot be read as a picture ({problem}); repair or remove it"
    named = listed([f"{name} ({problem})" for name, problem in broken])
    return f"{len(broken)} files cannot be read as pictures: {named}; repair or remove them"


def _look(item: tuple[int, Encoded | None]) -> tuple:
    place, picture = item
    if picture is None:
        return place, None, None, None
    digest = None
    try:
        content = picture.content()
        digest = hashlib.sha256(content).hexdigest()
        return place, picture, digest, examine(content)
    except Unreadable as error:
        return place, picture, digest, error


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
