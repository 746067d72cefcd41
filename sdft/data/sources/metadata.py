"""Captions in tables beside the images: `metadata.jsonl`, `.csv` or `.parquet`, as in the Hub's imagefolder.

A row has the path of the image in `file_name`, relative to the table, and the caption in `text` or `caption`. A list is
several captions; `weights` has their relative probabilities.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdft.data.captions import checked_texts
from sdft.data.error_messages import complain
from sdft.errors import UserError
from sdft.types import LARGEST

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption", "captions")
WeightedTexts = tuple[tuple[str, ...], tuple[float, ...]]
"""Captions of one image, and their weights; no weights if they are equally likely."""


def read_tables(root: Path, tables: list[str]) -> tuple[dict[str, WeightedTexts], list[str]]:
    """(captions by path of the image, relative to `root`), and the problems of the tables."""
    found: dict[str, WeightedTexts] = {}
    problems = []
    for table in tables:
        folder = PurePosixPath(table).parent
        for where, row in readable_rows(root / table):
            try:
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError("has no file_name")
                key = (folder / name).as_posix()
                if key in found:
                    raise ValueError(f"names {name}, which has a row already")
                found[key] = texts_of(row)
            except ValueError as error:
                problems.append(f"{where} {error}")
    return found, problems


def readable_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table, up to where it is broken."""
    try:
        yield from rows(table)
    except UserError as error:
        complain(error)


def packed(texts: WeightedTexts) -> str:
    """The captions of one image as one string."""
    return json.dumps(texts)


def unpacked(line: str) -> WeightedTexts:
    """The inverse of `packed`."""
    texts, weights = json.loads(line)
    return tuple(texts), tuple(weights)


def texts_of(row: Mapping[str, Any]) -> WeightedTexts:
    """The captions of one row and their weights. Raises ValueError with the reason if they are wrong."""
    value = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
    if value is None:
        raise ValueError(f"has no caption: one of {', '.join(CAPTION_COLUMNS)}")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError("has a caption that is neither text nor a list of texts")
    weights = row.get("weights") or ()
    numbers = isinstance(weights, list | tuple) and all(isinstance(w, int | float) and 0 < w < LARGEST for w in weights)
    if not numbers or (weights and len(weights) != len(texts)):
        raise ValueError("has weights that are not one positive number for each caption")
    return checked_texts(texts), tuple(float(w) for w in weights)


def rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of the row for messages, row) of a table."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        for number, row in enumerate(parquet_rows(table), 1):
            yield f"{table} row {number}", row
        return
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: {table} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if suffix == ".csv":
        yield from csv_rows(table, text)
        return
    # Lines end with \n alone: other separators, such as U+2028, may be in a caption.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{table} line {number}", json_row(table, number, line)


def csv_rows(table: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of the row for messages, row) of a CSV table."""
    reader, line = csv.DictReader(io.StringIO(text, newline=""), strict=True), 1
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise UserError(f"data.root: {table} has no column file_name in its first line; write file_name,text")
        line = reader.line_num + 1
        for row in reader:
            yield f"{table} line {line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote that is not closed" if "unexpected end of data" in str(error) else str(error)
        raise UserError(f"data.root: {table}, in the row of line {line}: {reason}; repair the table") from error


def json_row(table: Path, number: int, line: str) -> Mapping[str, Any]:
    """One line of a JSON table."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.root: {table} line {number} is not JSON ({error}); repair or remove it") from error
    if not isinstance(row, dict):
        raise UserError(f'data.root: {table} line {number} is no JSON object; write {{"file_name": ..., "text": ...}}')
    return row


def parquet_rows(table: Path) -> list[Mapping[str, Any]]:
    """Rows of a parquet table. Raises UserError without pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"data.root: {table} needs pyarrow, which is not installed: pip install -e '.[datasets]', or write the "
            "table as metadata.jsonl"
        ) from None
    try:
        return parquet.read_table(table).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors are kinds of these
        reason = " ".join(str(error).split())
        raise UserError(f"data.root: {table} is not a parquet table ({reason}); repair or remove it") from error
