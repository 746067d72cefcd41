"""Writing stored images as tar shards in WebDataset's layout, each with its index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sdft.data.decode import StoredImage
from sdft.data.source import Source
from sdft.data.sources.shards import read_index
from sdft.errors import UserError
from sdft.types import Count


def write_shards(source: Source, out: Path, per_shard: Count, bar: Callable[[Iterable], Iterable] = iter) -> list[Path]:
    """Write shards of `per_shard` samples with the original bytes of their images, and return their paths.

    An image `sub/cat.v2.jpg` becomes the sample `sub/cat_v2`, since WebDataset splits names at the first dot.
    Raises UserError if `out` is not empty, cannot be written to, or a sample is not a stored image.
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
            raise UserError(f"out={out}: {path.name} cannot be written ({error.strerror}); free some space") from error
        read_index(path)  # writes the index
        shards.append(path)
    return shards


def members_of(source: Source, index: int) -> list[tuple[str, bytes]]:
    """(suffix, content) of the files of one sample: the image, and one caption as text or several as JSON."""
    sample = source[index]
    if not isinstance(sample.image, StoredImage) or sample.captions is None:
        raise UserError(f"data: {sample.key} is generated; only stored images can be written to shards")
    texts, weights = sample.captions.texts, sample.captions.weights
    image = (PurePosixPath(sample.key).suffix.lower() or ".jpg", sample.image.content())
    if len(texts) == 1:
        return [image, (".txt", texts[0].encode())]
    row = {"captions": texts} | ({"weights": weights} if weights else {})
    return [image, (".json", json.dumps(row, ensure_ascii=False).encode())]


def sample_names(keys: Iterable[str]) -> list[str]:
    """A unique name without dots for each key; with the suffix in it where names would be equal otherwise."""
    taken: dict[str, str] = {}
    for key in keys:
        path = PurePosixPath(key)
        folder = "/".join(part.replace(".", "_") for part in path.parent.parts)
        options = (path.stem.replace(".", "_"), path.name.replace(".", "_"))
        full = [f"{folder}/{name}" if folder else name for name in options]
        name = next((name for name in full if name not in taken), None)
        if name is None:
            raise UserError(f"data: {key} and {taken[full[1]]} would have the same name in a shard; rename one of them")
        taken[name] = key
    return list(taken)
