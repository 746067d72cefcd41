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
FETCHED = ("http", "https", "s3", "gs", "hf")
"""Schemes of URLs that lists may have; `data.shards` itself also takes others and commands."""
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
        return expanded(self.url.removeprefix("file://"))


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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f'data.shards={url}: is no list of shards; one is {{"__kind__": "{LIST_KIND}", "shardlist": [{{"url": '
            '"000000.tar"}]}, as python -m sdft.data shard writes it'
        ) from error
    found = []
    for name, size, md5 in rows:
        if type(name) is not str or type(size) not in (int, type(None)) or type(md5) not in (str, type(None)):
            raise UserError(f"data.shards={url}: has a shard without a url, or with a size that is no number")
        found.append(ShardUrl(placed(name, file, url), size, md5 and md5.lower()))
    return found


def placed(name: str, file: Path, url: str) -> str:
    """Where a shard of a list is. Raises UserError for all but files and what is fetched from a known service."""
    try:
        scheme = urlparse(name).scheme  # as the opener has it: in lower case, without tabs and line ends
        known = scheme in FETCHED or scheme == ""
    except ValueError:
        known = False
    if not known or not name.isprintable():
        raise UserError(
            f"data.shards={url}: has {name!r}, and lists may name files and {', '.join(FETCHED)} only; name commands "
            "in data.shards itself"
        )
    if scheme:
        return name
    return urljoin(url, name) if urlparse(url).scheme else str(file.parent / expanded(name))


def expanded(name: str) -> Path:
    """A path, its `~` expanded if that is a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def write_list(file: Path, shards: list[ShardUrl], samples: list[int]) -> None:
    """Write a list of shards, which `wids` and `data.shards` read."""
    rows = [
        {"url": shard.url, "filesize": shard.size, "md5sum": shard.md5, "nsamples": num}
        for shard, num in zip(shards, samples, strict=True)
    ]
    content = {"__kind__": LIST_KIND, "wids_version": 1, "name": file.parent.name, "shardlist": rows}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
