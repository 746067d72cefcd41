"""Stored pictures into tar shards in the layout of WebDataset, each with its index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sdft.data.dataset import Source
from sdft.data.decode import StoredImage
from sdft.data.sources.shards import entries_of
from sdft.errors import UserError
from sdft.types import Count


def write_shards(source: Source, out: Path, per_shard: Count, bar: Callable[[Iterable], Iterable] = iter) -> list[Path]:
    """Shards of `per_shard` samples with the very bytes of their pictures; the same source gives the same bytes.

    A picture `sub/cat.v2.jpg` becomes the sample `sub/cat_v2`: readers take the first dot for the end of the name.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out}: the folder is not empty; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    names = sample_names(source.keys)
    shards = []
    for number, first in enumerate(bar(range(0, len(names), per_shard))):
        path = out / f"{number:06d}.tar"
        partial = path.with_suffix(".partial")
        try:
            with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
                for index in range(first, min(first + per_shard, len(names))):
                    for suffix, content in members_of(source, index):
                        member = tarfile.TarInfo(names[index] + suffix)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"out={out}: {path.name} cannot be written ({error.strerror}); make room") from error
        entries_of(path)  # writes the index
        shards.append(path)
    return shards


def members_of(source: Source, index: int) -> list[tuple[str, bytes]]:
    """The files of one sample by suffix: the picture, and one caption as text or several as JSON."""
    sample = source[index]
    if not isinstance(sample.picture, StoredImage) or sample.captions is None:
        raise UserError(f"data: {sample.key} is drawn, not stored; only stored pictures go into shards")
    texts, weights = sample.captions.texts, sample.captions.weights
    picture = (PurePosixPath(sample.key).suffix.lower() or ".jpg", sample.picture.content())
    if len(texts) == 1:
        return [picture, (".txt", texts[0].encode())]
    row = {"captions": texts} | ({"weights": weights} if weights else {})
    return [picture, (".json", json.dumps(row, ensure_ascii=False).encode())]


def sample_names(keys: Iterable[str]) -> list[str]:
    """A name without dots for each key, all different; the suffix joins in where two would be the same."""
    taken: dict[str, str] = {}
    for key in keys:
        path = PurePosixPath(key)
        folder = "/".join(part.replace(".", "_") for part in path.parent.parts)
        options = (path.stem.replace(".", "_"), path.name.replace(".", "_"))
        full = [f"{folder}/{name}" if folder else name for name in options]
        name = next((name for name in full if name not in taken), None)
        if name is None:
            raise UserError(f"data: {key} and {taken[full[1]]} would have one name in a shard; rename one of them")
        taken[name] = key
    return list(taken)
