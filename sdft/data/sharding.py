"""Writing stored images as tar shards in WebDataset's layout, each with its index, and a list of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from webdataset import ShardWriter

from sdft.data.decode import StoredImage
from sdft.data.source import Source, stored_mask
from sdft.data.sources.shard_copies import Arrived
from sdft.data.sources.shard_index import MASK, index_of
from sdft.data.sources.shard_urls import ShardUrl, write_list
from sdft.errors import UserError
from sdft.types import Count, Positive

LIST = "shards.json"


def write_shards(
    source: Source,
    out: Path,
    per_shard: Count,
    bar: Callable[[Iterable], Iterable] = iter,
    most_gb: Positive = 3.0,
) -> list[Path]:
    """Write shards of at most `per_shard` samples and about `most_gb` 10^9 bytes with the original bytes of the images,
    and a list of them, `shards.json`. Returns the paths of the shards.

    An image `sub/cat.v2.jpg` becomes the sample `sub/cat_v2`, since WebDataset splits names at the first dot.
    Raises UserError if `out` is not empty, cannot be written to, or a sample is not a stored image.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out}: the folder is not empty; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    names = sample_names(source.keys)
    files: list[IO[bytes]] = []
    shards: list[Path] = []

    def begin(name: str) -> IO[bytes]:
        files.append(Path(name).with_suffix(".partial").open("wb"))
        return files[-1]

    def end(name: str) -> None:
        files.pop().close()
        Path(name).with_suffix(".partial").replace(name)
        shards.append(Path(name))

    pattern = str(out).replace("%", "%%") + "/%06d.tar"
    options: dict[str, Any] = {
        "encoder": False,
        "mtime": 0,
        "format": "PAX_FORMAT",
        "user": "",
        "group": "",
        "verbose": 0,
    }
    try:
        with ShardWriter(pattern, per_shard, most_gb * 1e9, post=end, opener=begin, **options) as writer:
            for index in bar(range(len(names))):
                writer.write({"__key__": names[index], **dict(members_of(source, index, names[index]))})
        found = [index_of(path) for path in shards]  # which writes the indexes
        urls = [(path.name, Arrived.of(path)) for path in shards]
        write_list(out / LIST, [ShardUrl(name, a.size, a.md5) for name, a in urls], [len(index) for index in found])
    except OSError as error:
        raise UserError(f"out={out}: the shards cannot be written ({error.strerror}); free some space") from error
    finally:
        for file in files:
            file.close()
            Path(file.name).unlink(missing_ok=True)
    return shards


def members_of(source: Source, index: int, name: str) -> list[tuple[str, bytes]]:
    """(suffix, content) of the files of one sample: the image, its mask, one caption as text, and as JSON what does
    not fit there: several captions, and a name that has changed."""
    sample = source[index]
    if not isinstance(sample.image, StoredImage) or sample.captions is None:
        raise UserError(f"data: {sample.key} is generated; only stored images can be written to shards")
    mask = stored_mask(source, index)
    texts, weights = sample.captions.texts, sample.captions.weights
    suffix = PurePosixPath(sample.key).suffix or ".jpg"
    members = [(suffix.removeprefix("."), sample.image.content())]
    row: dict[str, Any] = {} if f"{name}{suffix}" == sample.key else {"file_name": sample.key}
    if mask is not None:
        members.append((MASK, mask.content()))
    if len(texts) == 1:
        members.append(("txt", texts[0].encode()))
    else:
        row |= {"captions": texts} | ({"weights": weights} if weights else {})
    if row:
        members.append(("json", json.dumps(row, ensure_ascii=False).encode(errors="surrogateescape")))
    return members


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
