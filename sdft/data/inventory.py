"""What a run is trained on, in a form that a checkpoint can keep: a resumed run says what has changed since."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdft.data.masks import Masks
from sdft.data.packed_strings import PackedStrings, SearchableStrings, printable
from sdft.data.scan import Scan
from sdft.data.source import Source, stored_mask

MOST_NAMED = 5


@dataclass(frozen=True)
class Inventory:
    """The samples of a set: their keys, and a digest of the image file and the captions of each. About 20 bytes a
    sample are kept. Generated samples are known by their keys alone."""

    keys: Sequence[str]
    digests_N: np.ndarray
    """uint64; the beginning of a SHA-256"""

    @classmethod
    def of(cls, source: Source, scan: Scan, masks: Masks = False) -> Inventory:
        """Of a source whose images were scanned; reads no image. masks: those of the set; masks in files are read."""
        return cls(
            source.keys, np.fromiter((digest_of(source, scan, i, masks) for i in range(len(source.keys))), np.uint64)
        )

    def state(self) -> dict[str, bytes]:
        """For a checkpoint."""
        names = "\0".join(self.keys).encode(errors="surrogateescape")
        return {"keys": zlib.compress(names), "digests": self.digests_N.astype("<u8").tobytes()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Inventory:
        """The inverse of `state`."""
        names = zlib.decompress(state["keys"]).decode(errors="surrogateescape")
        return cls(PackedStrings(names.split("\0") if names else ()), np.frombuffer(state["digests"], "<u8"))

    def changes_since(self, earlier: Inventory) -> list[str]:
        """What was added, removed and edited, a phrase for each; empty if nothing was."""
        if list(self.keys) == list(earlier.keys) and np.array_equal(self.digests_N, earlier.digests_N):
            return []
        here, there = SearchableStrings(self.keys), SearchableStrings(earlier.keys)
        found = {key: there.find(key) for key in here}
        edited = [key for place, (key, old) in enumerate(found.items())
                  if old is not None and self.digests_N[place] != earlier.digests_N[old]]  # fmt: skip
        kinds = {
            "added": [key for key, old in found.items() if old is None],
            "removed": [key for key in there if here.find(key) is None],
            "edited": edited,
        }
        if not any(kinds.values()):
            return ["the images are in another order"]
        return [f"{len(keys)} {kind} ({named(keys)})" for kind, keys in kinds.items() if keys]


def named(keys: Sequence[str]) -> str:
    """The first of the keys."""
    shown = ", ".join(map(printable, keys[:MOST_NAMED]))
    return shown + (", ..." if len(keys) > MOST_NAMED else "")


def digest_of(source: Source, scan: Scan, index: int, masks: Masks) -> int:
    """Of the image file, the mask, the captions and the weight of a sample."""
    content = scan.digest(index)
    if content is None:
        return 0
    sample = source[index]
    captions = sample.captions
    texts = [captions.texts, captions.weights, captions.template] if captions else sample.caption
    mask = stored_mask(source, index) if masks is True else None
    drawn = [hashlib.sha256(mask.content()).hexdigest()] if mask else ["alpha"] if masks == "alpha" else []
    found = hashlib.sha256(json.dumps([content, texts, sample.loss_weight, *drawn]).encode())
    return int.from_bytes(found.digest()[:8], "little")
