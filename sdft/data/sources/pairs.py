"""Pairs of pictures for one caption, of which one is preferred: from a table, from votes, and of the toy world.

A source of pairs is a `Source` of the preferred pictures, and has another one of the rejected ones as `rejected`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from sdft.data.captions import Captions, checked_template, checked_texts
from sdft.data.decode import StoredImage
from sdft.data.error_messages import join_problems
from sdft.data.packed_strings import PackedStrings
from sdft.data.source import Sample, Source, StoredSource
from sdft.data.sources.folder import stored_file
from sdft.data.sources.splits import Split, split_indices
from sdft.data.sources.toy import Look, ToyWorld
from sdft.errors import UserError
from sdft.types import Fraction, NumScenes, Seed, Side

TABLE = "pairs.jsonl"
NO_PREFERENCE = {"tie": "no preference in a vote", "skip": "a vote that was skipped"}
"""Choices of a vote that make no pair -> how they are counted."""


@runtime_checkable  # so that the config check tells a number or a path from a source
class PairSource(Source, Protocol):
    """Pairs of pictures by index; the samples are those of the preferred pictures.

    rejected: the other pictures, with the same keys and captions: both are cropped, flipped and captioned alike.
    """

    @property
    @abstractmethod
    def rejected(self) -> Source: ...


class Pair(NamedTuple):
    """Two picture files and their caption."""

    chosen: Path
    rejected: Path
    caption: str


class Pictures(StoredSource):
    """One picture of each pair, by the key of the pair."""

    def __init__(self, keys: Sequence[str], files: Iterable[str], captions: Sequence[str], template: str):
        self.keys, self._files, self._captions, self._template = keys, PackedStrings(files), captions, template

    def stored(self, index: int) -> StoredImage:
        """The image file."""
        return stored_file(Path(self._files[index]))

    def __getitem__(self, index: int) -> Sample:
        captions = Captions((self._captions[index],), (), self._template)
        return Sample(self.keys[index], self.stored(index), captions.plain, captions=captions)


class StoredPairs(Pictures):
    """Pairs of picture files.

    split, held_out: a share of the preferred pictures is held out, with all of their pairs, by the names of their
        files, so adding pairs never moves others.
    """

    def __init__(self, root: Path, pairs: Sequence[Pair], split: Split, held_out: float, caption: str, key: str):
        template, names = checked_template("data.caption", caption), [str(pair.chosen) for pair in pairs]
        if split != "all" and len(set(names)) < 2:
            raise UserError(f"data.{key}: has {len(set(names))} preferred pictures, needs 2: one of them is held out")
        kept = [pairs[place] for place in indices_of(names_below(root, names), split, held_out)]
        keys = PackedStrings(numbered(" > ".join(names_below(root, [one.chosen, one.rejected])) for one in kept))
        captions = PackedStrings(pair.caption for pair in kept)
        super().__init__(keys, (str(pair.chosen) for pair in kept), captions, template)
        self.rejected = Pictures(keys, (str(pair.rejected) for pair in kept), captions, template)


class PairFolder(StoredPairs):
    """Pairs of a folder with a table `pairs.jsonl`: on each line
    `{"chosen": "a.png", "rejected": "b.png", "caption": "a red fox"}`, with paths relative to the folder.

    root: the folder. split, held_out: as in `StoredPairs`; `all` is both. caption: format string of the training
    caption; `{caption}` is the pair's own. default_caption: of pairs without one, which are an error if it is None.

    Raises UserError for a table that cannot be read, and for wrong lines, all named.
    """

    def __init__(
        self,
        root: str,
        split: Split,
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
        default_caption: str | None = None,
    ):
        folder = Path(root).expanduser()
        pairs = checked(rows_of(folder / TABLE), folder, "root", default_caption)
        super().__init__(folder, pairs, split, held_out, caption, "root")


class Votes(StoredPairs):
    """Pairs of the blind vote on the page of a comparison, from the JSON that its button exports. The caption of a pair
    is the prompt. Votes without preference make no pair, and are counted in `left_out`.

    votes: the file, or several. run: the folder of the comparison, with the page and its pictures; that of the file if
    None. split, held_out: as in `StoredPairs`. caption: format string of the training caption; `{caption}` is the
    prompt.

    Raises UserError for a file that is no export of a vote, and for pictures that are missing, all named.
    """

    def __init__(
        self,
        votes: str | Sequence[str],
        split: Split,
        run: str | None = None,
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
    ):
        files = [Path(name).expanduser() for name in ([votes] if isinstance(votes, str) else votes)]
        if not files:
            raise UserError("data.votes=[]: names no file; pass data.votes=votes.json")
        undecided, pairs = Counter[str](), []
        folder = Path(run).expanduser() if run is not None else files[0].parent
        for file in files:
            place = folder if run is not None else file.parent
            pairs += checked(
                votes_of(file, undecided), place, "votes", None, "set data.run to the folder of the report"
            )
        self.left_out = [f"{count} x {NO_PREFERENCE[choice]}" for choice, count in sorted(undecided.items())]
        super().__init__(folder, pairs, split, held_out, caption, "votes")


class ToyPairs(ToyWorld):
    """Each scene in two looks, of which one is always preferred.

    preferred, other: the looks. The rest is that of `ToyWorld`.
    """

    def __init__(
        self,
        preferred: Look,
        other: Look,
        num_scenes: NumScenes,
        split: Literal["train", "validation", "test"],
        caption: str = "{caption}",
        size: Side = 64,
        world_seed: Seed = 0,
    ):
        if preferred == other:
            raise UserError(f"data: preferred={preferred} and other={other} must be two looks")
        super().__init__([preferred], num_scenes, split, caption, size, world_seed)
        self.rejected = ToyWorld([other], num_scenes, split, caption, size, world_seed)
        self.keys = [f"toy/{preferred} > {other}/{split}/{i}" for i in range(num_scenes)]
        self.rejected.keys = self.keys


def rows_of(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of the row for messages, row) of a table of pairs."""
    for number, line in enumerate(read(table, "root").split("\n"), 1):
        where = f"{table} line {number}"
        if line.strip():
            yield where, parsed(line, f"data.root: {where}")


def votes_of(file: Path, undecided: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of the vote for messages, the pair) of each vote with a preference; `undecided` counts the others."""
    content = parsed(read(file, "votes"), f"data.votes: {file}")
    votes = content.get("votes")
    if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes):
        raise UserError(f"data.votes: {file} is not an export of a vote; press 'Export as JSON' on the page of eval.py")
    for number, vote in enumerate(votes, 1):
        where, choice = f"{file} vote {number}", vote.get("choice")
        if choice in NO_PREFERENCE:
            undecided[choice] += 1
        elif choice not in ("left", "right"):
            raise UserError(f"data.votes: {where} has the choice {choice!r}, which is none; export the votes again")
        else:
            sides = [vote.get(side) for side in ("left", "right")][:: 1 if choice == "left" else -1]
            paths = [side.get("path") if isinstance(side, dict) else None for side in sides]
            axes = vote.get("axes")
            prompt = axes.get("prompt") if isinstance(axes, dict) else None
            yield where, {"chosen": paths[0], "rejected": paths[1], "caption": prompt}


def read(file: Path, key: str) -> str:
    """The text of a file. Raises UserError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"data.{key}: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.{key}: {file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def parsed(text: str, where: str) -> dict[str, Any]:
    """The JSON object of a text. Raises UserError if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); repair it") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object")
    return value


def checked(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    folder: Path,
    key: str,
    default_caption: str | None,
    remedy: str = "repair the table",
) -> list[Pair]:
    """The pairs of rows with `chosen`, `rejected` and `caption`. Raises UserError naming every wrong one."""
    pairs, problems = [], []
    for where, row in rows:
        try:
            pairs.append(pair_of(row, folder, default_caption))
        except ValueError as error:
            problems.append(f"{where} {error}")
    if problems:
        raise UserError(f"data.{key}: {join_problems(problems)}; {remedy}")
    if not pairs:
        raise UserError(f"data.{key}: no pair with a preference in {folder}")
    return pairs


def pair_of(row: Mapping[str, Any], folder: Path, default_caption: str | None) -> Pair:
    """The pair of a row. Raises ValueError with the reason if it is wrong."""
    files = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"has no path of a picture as {name!r}")
        if not (folder / value).is_file():
            raise ValueError(f"names {value}, which is not in {folder}")
        files.append(folder / value)
    if files[0] == files[1]:
        raise ValueError(f"compares {row['chosen']} with itself")
    caption = row.get("caption", default_caption)
    if not isinstance(caption, str):
        raise ValueError("has no caption")
    return Pair(files[0], files[1], checked_texts([caption])[0])


def indices_of(names: Sequence[str], split: Split, share: float) -> list[int]:
    """The places of a split, in which those of one name are together."""
    unique = list(dict.fromkeys(names))
    inside = {unique[place] for place in split_indices(unique, split, share)}
    return [place for place, name in enumerate(names) if name in inside]


def names_below(root: Path, files: Iterable[Any]) -> list[str]:
    """Paths relative to the folder, where they are below it."""
    return [file.relative_to(root).as_posix() if (file := Path(f)).is_relative_to(root) else str(file) for f in files]


def numbered(names: Iterable[str]) -> Iterator[str]:
    """The names, with a number behind each repeat: a pair that was judged twice counts twice."""
    seen = Counter[str]()
    for name in names:
        yield f"{name}#{seen[name]}" if seen[name] else name
        seen[name] += 1
