"""The contract of sources: plain ones, and those with stored images."""

from __future__ import annotations

import numpy as np
import pytest

from sdft.data.source import Sample, StoredSource, stored_image
from sdft.data.sources import Folder, HuggingFace, Mix, Shards
from sdft.data.sources.splits import Subset


class Plain:
    """A source as docs/extending.md shows it: only `keys` and `__getitem__`."""

    keys = ("a", "b")

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.keys[index], np.zeros((16, 16, 3), np.uint8), self.keys[index])


def test_a_plain_source_has_no_stored_images_alone_in_a_mix_and_in_a_subset():
    assert stored_image(Plain(), 0) is None
    assert stored_image(Mix({"plain": Plain()}), 1) is None
    assert stored_image(Subset(Plain(), [1]), 0) is None


def test_every_source_of_files_offers_its_stored_images():
    for kind in (Folder, HuggingFace, Shards, Mix, Subset):
        assert issubclass(kind, StoredSource)
    with pytest.raises(TypeError, match="stored"):
        type("Incomplete", (StoredSource,), {"__getitem__": lambda self, index: None})()
