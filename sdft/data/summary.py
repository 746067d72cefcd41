"""A summary of a dataset before training: counts, sizes, crops, captions, duplicates.

Knows `ImageDataset` and the scan of its source, not where they come from or where the summary is printed.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from imagehash import dhash
from PIL import Image

from sdft.data.dataset import ImageDataset
from sdft.data.images import CropPlan, plan_crop
from sdft.data.quality import flags_of, to_leave_out
from sdft.data.scan import Scan
from sdft.data.source import Sample
from sdft.pages.html import thumbnail

NEAR = 4
"""Bits of 64 in which the difference hashes of near-duplicates may differ."""
MOST_NAMED = 5
THUMBNAIL, MOST_THUMBNAILS = 256, 2000
"""Side in pixels, and number: of a large set where all are flagged, the page shows the first."""


@dataclass
class DataSummary:
    """One row per image in each column but `target_hw`, groups of duplicates, and the images that cannot be decoded."""

    keys: list[str] = field(default_factory=list)
    original_hw: list[tuple[int, int]] = field(default_factory=list)
    target_hw: list[tuple[int, int]] = field(default_factory=list)
    """the training sizes of all images; several of each with `data.sizes`"""
    kept: list[float] = field(default_factory=list)
    """share of the image area that the crop keeps, at the largest side"""
    enlarged: list[float] = field(default_factory=list)
    """factor on the sides by the resize, at the largest side"""
    captions: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """of the longest caption of an image; empty without a tokenizer"""
    duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)
    """why images should be looked at; see `quality.flags_of`"""
    proposed: dict[str, str] = field(default_factory=dict)
    """images that are nearly the same as another -> the one to keep"""
    thumbnails: dict[str, dict] = field(default_factory=dict)
    """of images with a flag, or nearly the same as another, up to MOST_THUMBNAILS"""

    def show(self, key: str, image_HWC: np.ndarray) -> None:
        """Keep a thumbnail of an image, if there is room."""
        if len(self.thumbnails) < MOST_THUMBNAILS:
            self.thumbnails[key] = thumbnail(Image.fromarray(image_HWC), THUMBNAIL)

    def lines(self, missing: str | None = None, most_tokens: int = 77) -> list[str]:
        """The summary as lines of text.

        missing: the placeholder of missing captions. most_tokens: tokens of a caption that the model reads, including
        the start and end tokens.
        """
        h, w = (sorted(sides) for sides in zip(*self.original_hw, strict=True))
        words = [len(caption.split()) for caption in self.captions]
        large = [key for key, factor in zip(self.keys, self.enlarged, strict=True) if factor > 1]
        cropped = [key for key, share in zip(self.keys, self.kept, strict=True) if share < 0.75]
        bare = [key for key, caption in zip(self.keys, self.captions, strict=True) if caption == missing]
        long = [key for key, count in zip(self.keys, self.tokens, strict=False) if count > most_tokens]
        found = [
            f"images           {len(self.keys)}, and {len(self.broken)} that cannot be read",
            *(f"  {name} ({problem})" for name, problem in self.broken),
            *(f"  left out: {line}" for line in self.left_out),
            f"sizes            {w[0]} to {w[-1]} wide, {h[0]} to {h[-1]} high, "
            f"median {statistics.median(w):.0f} x {statistics.median(h):.0f}",
            f"enlarged         {counted(large)}",
            f"cropped by > 25% {counted(cropped)}",
            f"duplicates       {grouped(self.duplicates)}",
            f"near-duplicates  {grouped(self.near_duplicates)}",
            f"to look at       {flag_counts(self.flags)}",
            f"captions         {min(words)} to {max(words)} words, median {statistics.median(words):.0f}; "
            f"{len(set(self.captions))} different ones",
            f"without caption  {counted(bare)}",
        ]
        if self.tokens:
            found.append(f"{f'over {most_tokens} tokens':16} {counted(long)}{', truncated there' if long else ''}")
        return [*found, "training sizes, width x height:", *self._histogram()]

    def _histogram(self) -> list[str]:
        counts = Counter(self.target_hw)
        most = max(counts.values())
        return [f"  {w:>5} x {h:<5} {num:>7}  {'#' * -(-40 * num // most)}" for (h, w), num in sorted(counts.items())]


def counted(keys: Sequence[str]) -> str:
    """The number of keys, and the first of them."""
    if not keys:
        return "none"
    rest = f", and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"{len(keys)}: {', '.join(keys[:MOST_NAMED])}{rest}"


def grouped(groups: Sequence[Sequence[str]]) -> str:
    """The number of groups, and the first of them."""
    return counted([" = ".join(group) for group in groups])


def flag_counts(flags: Mapping[str, Sequence[str]]) -> str:
    """How many images have each kind of flag."""
    counts = Counter(flag.partition(" (")[0] for each in flags.values() for flag in each)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"


def summarize(
    parts: Sequence[tuple[ImageDataset, Scan]],
    visit: Callable[[Sample, np.ndarray, CropPlan], None],
    bar: Callable[[Iterable], Iterable] = iter,
    count_tokens: Callable[[str], int] | None = None,
) -> DataSummary:
    """Reads every image once, and those that are nearly the same as another twice.

    parts: datasets with the scans of their sources. visit: called with each sample, its image, and the crop at each of
    its training sizes. bar: wraps the loop.
    count_tokens: of a caption.
    """
    found = DataSummary()
    same, hashes = defaultdict(list), {}
    places: dict[str, tuple[ImageDataset, int]] = {}
    rows = [(dataset, scan, *row) for dataset, scan in parts for row in enumerate(dataset.items_of_samples())]
    for dataset, scan, index, items in bar(rows):
        sample = dataset.source[index]
        image = sample.image_HWC
        plans = [dataset.crop_plan(item, image.shape[:2], flip=False) for item in items]
        plan = plans[-1] if plans else plan_crop(image.shape[:2], image.shape[:2])  # too small for data.sizes
        found.keys.append(sample.key)
        found.original_hw.append(plan.original_hw)
        found.target_hw += [each.target_hw for each in plans]
        found.kept.append(np.prod(plan.target_hw) / np.prod(plan.resized_hw))
        found.enlarged.append(plan.resized_hw[0] / plan.original_hw[0])
        found.captions.append(sample.caption)
        if count_tokens:
            texts = sample.captions.every if sample.captions else None
            found.tokens.append(max(count_tokens(text) for text in texts or (sample.caption,)))
        same[scan.digest(index) or sample.key].append(sample.key)
        hashes[sample.key] = difference_hash(image)
        places[sample.key] = (dataset, index)
        if flags := flags_of(image, plan.target_hw, plan.resized_hw):
            found.flags[sample.key] = flags
            found.show(sample.key, image)
        for each in plans:
            visit(sample, image, each)
    found.duplicates = [keys for keys in same.values() if len(keys) > 1]
    found.near_duplicates = near_groups(hashes, found.duplicates)
    sizes = dict(zip(found.keys, found.original_hw, strict=True))
    groups = [*found.duplicates, *found.near_duplicates]
    found.proposed = to_leave_out(groups, sizes)
    for key in (key for group in groups for key in group if key not in found.thumbnails):
        if len(found.thumbnails) < MOST_THUMBNAILS:
            dataset, index = places[key]
            found.show(key, dataset.source[index].image_HWC)
    return found


def difference_hash(image_HWC: np.ndarray) -> int:
    """imagehash's `dhash`, 64 bits: whether each of 8 x 8 cells of the grey image is darker than its right neighbour.

    As an int, which `near_groups` compares by bands; imagehash has no search among many hashes.
    """
    return int(str(dhash(Image.fromarray(image_HWC), hash_size=8)), 16)


def near_groups(hashes: dict[str, int], known: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Keys whose hashes differ in at most NEAR bits, without those that are `known` to be the same.

    Two such hashes agree in at least one of NEAR + 1 bands, so only images that share a band are compared.
    """
    alike = defaultdict(list)
    repeated = {key for group in known for key in group[1:]}
    for key, value in hashes.items():
        if key not in repeated:
            alike[value].append(key)
    bands = defaultdict(list)
    width = -(-64 // (NEAR + 1))
    for value in alike:
        for band in range(NEAR + 1):
            bands[band, value >> band * width & (1 << width) - 1].append(value)
    leader = {value: value for value in alike}

    def top(value: int) -> int:
        while leader[value] != value:
            value = leader[value]
        return value

    for values in bands.values():
        for a, b in combinations(values, 2):
            if (a ^ b).bit_count() <= NEAR:
                leader[top(b)] = top(a)
    groups: dict[int, list[str]] = defaultdict(list)
    for value, keys in alike.items():
        groups[top(value)] += keys
    return [keys for keys in groups.values() if len(keys) > 1]
