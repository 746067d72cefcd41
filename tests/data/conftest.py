"""Pictures of mixed shapes, stored in every way."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdft.data.captions import Tags
from sdft.data.sharding import write_shards
from sdft.data.source import Source
from sdft.data.sources import Folder, Mix, Shards


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """The same nine pictures of three shapes, their tags shuffled, as a folder, as shards and in a mix."""
    root = tmp_path_factory.mktemp("pictures")
    g = np.random.default_rng(0)
    for i, hw in enumerate([(40, 60), (60, 40), (48, 48)] * 3):
        Image.fromarray(g.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"tag {i}, red, round, big")
    tags = Tags(shuffle=True, keep_first=1, drop=0.2)
    write_shards(Folder(str(root), "all"), root.parent / "shards", per_shard=4)
    stored = Folder(str(root), "all", tags=tags)
    sharded = Shards(str(root.parent / "shards" / "{000000..000002}.tar"), "all", tags=tags)
    return {"folder": stored, "shards": sharded, "mix": Mix({"a": stored, "b": sharded}, repeats={"a": 2})}
