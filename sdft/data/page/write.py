"""Writes the page of images to look at."""

from __future__ import annotations

from pathlib import Path

from sdft.data.packed_strings import printable
from sdft.data.summary import DataSummary
from sdft.pages import html

HERE = Path(__file__).parent
NEAR = "Nearly the same"


def write_page(path: Path, found: DataSummary, name: str) -> int:
    """Write the page of a summary, and return the number of images on it. name: of the set."""
    items = [
        {"key": printable(key), "flags": found.flags.get(key, []), "proposed": key in found.proposed, "picture": small}
        for key, small in found.thumbnails.items()
    ]
    groups: list[dict] = [
        {"title": NEAR, "keys": [printable(key) for key in group if key in found.thumbnails]}
        for group in (*found.duplicates, *found.near_duplicates)
    ]
    reasons: dict[str, list[str]] = {}
    for key in found.thumbnails:
        for flag in found.flags.get(key, []):
            reasons.setdefault(flag.partition(" (")[0].capitalize(), []).append(printable(key))
    groups += [{"title": reason, "keys": keys} for reason, keys in sorted(reasons.items())]
    place = html.storage_key([name, [[item["key"], item["flags"]] for item in items]])
    flagged = {*found.flags, *(key for group in (*found.duplicates, *found.near_duplicates) for key in group)}
    counts = {"total": len(found.keys), "hidden": len(flagged) - len(items)}
    data = {"id": place, "folder": name, "items": items, "groups": groups, **counts}
    path.parent.mkdir(parents=True, exist_ok=True)
    html.write_whole(path, html.page(HERE, "flagged", "Images to look at", ("flagged",), data))
    return len(items)
