"""The names of tar shards: brace patterns, and lists in the format of WebDataset's `wids`."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlparse, urlsplit, urlunsplit

from sdft.errors import UserError

MAX_SHARDS = 100_000
LIST_KIND = "wids-shard-index-v1"


@dataclass(frozen=True)
class ShardUrl:
    """A shard as it was named: a path, a URL, or `pipe:COMMAND`.

    size: in bytes, and md5: in hex digits, as a list of shards states them; None if it does not.
    """

    url: str
    size: int | None = None
    md5: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is no local file: reading it needs a copy."""
        return urlparse(self.url).scheme not in ("", "file")

    @property
    def name(self) -> str:
        """The URL for messages: without a password, and without a query, where signed URLs have their key."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https"):
            return self.url
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="..." if parts.query else "")
        return urlunsplit(shown)

    @property
    def path(self) -> Path:
        """The path of a local shard."""
        return Path(self.url.removeprefix("file://")).expanduser()


def expand(shards: str) -> list[str]:
    """The paths, URLs and commands of a brace pattern."""
    from braceexpand import braceexpand

    for low, high, step in re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", shards):
        if abs(int(high) - int(low)) // max(abs(int(step or 1)), 1) >= MAX_SHARDS:
            pattern = f"{{{low}..{high}}}"
            raise UserError(f"data.shards: {pattern} are more than {MAX_SHARDS:,} shards; name those that exist")
    try:
        urls = (url for pattern in shards.split("::") for url in braceexpand(pattern))
        found = list(itertools.islice(urls, MAX_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        reason = "braces in braces too deep" if isinstance(error, RecursionError) else f"an unclosed brace ({error})"
        raise UserError(f"data.shards={shards[:200]}: {reason}") from error
    if len(found) > MAX_SHARDS:
        raise UserError(f"data.shards={shards[:200]}: are more than {MAX_SHARDS:,} shards; name those that exist")
    return found


def listed(file: Path, url: str) -> list[ShardUrl]:
    """The shards of a list, `{"shardlist": [{"url": ..., "filesize": ..., "md5sum": ...}]}`.

    url: where the list is from; names in it are relative to that. Lists come from elsewhere, so commands in them are
    refused.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [(row["url"], row.get("filesize"), row.get("md5sum")) for row in content["shardlist"]]
    except OSError as error:
        raise UserError(f"data.shards={url}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'data.shards={url}: is no list of shards; one is {{"__kind__": "{LIST_KIND}", "shardlist": [{{"url": '
            '"000000.tar"}]}, as python -m sdft.data shard writes it'
        ) from error
    found = []
    for name, size, md5 in rows:
        if not (isinstance(name, str) and isinstance(size, int | None) and isinstance(md5, str | None)):
            raise UserError(f"data.shards={url}: has a shard without a url, or with a size that is no number")
        if name.startswith("pipe:"):
            raise UserError(f"data.shards={url}: has the command {name!r}; name commands in data.shards itself")
        if urlparse(name).scheme:
            whole = name
        else:
            whole = urljoin(url, name) if urlparse(url).scheme else str(file.parent / Path(name).expanduser())
        found.append(ShardUrl(whole, size, md5))
    return found


def write_list(file: Path, shards: list[ShardUrl], samples: list[int]) -> None:
    """Write a list of shards, which `wids` and `data.shards` read."""
    rows = [
        {"url": shard.url, "filesize": shard.size, "md5sum": shard.md5, "nsamples": num}
        for shard, num in zip(shards, samples, strict=True)
    ]
    content = {"__kind__": LIST_KIND, "wids_version": 1, "name": file.parent.name, "shardlist": rows}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
