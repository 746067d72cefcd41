"""Reads the files of kohya's sd-scripts: a command line, `--config_file` and `--dataset_config`, folders of images."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.errors import UserError

SDXL_SCRIPTS = {"sdxl_train_network.py": "lora", "sdxl_train.py": "full", "sdxl_train_textual_inversion.py": "words"}
"""Scripts that train SDXL, and how."""
LAUNCHER_OPTIONS = "of accelerate launch"
OWN_KEYS = ("image_dir", "num_repeats", "is_reg", "class_tokens")
"""Of one subset of images; the others are settings."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


@dataclass(frozen=True)
class Subset:
    """One folder of images. repeats: per epoch. caption: of images without one. is_reg: regularisation images."""

    folder: str
    repeats: int = 1
    caption: str | None = None
    is_reg: bool = False


@dataclass(frozen=True)
class Config:
    """A configuration for sd-scripts.

    script: its name; that of LoRA training if the file does not say. values: options as given.
    launcher: arguments before the script. subsets: of a dataset config; empty without one. mixed: settings that differ
    between its subsets or datasets. folder: where relative paths are tried.
    """

    script: str
    values: dict[str, Any]
    folder: Path
    launcher: tuple[str, ...] = ()
    subsets: tuple[Subset, ...] = ()
    mixed: Mapping[str, list[Any]] | None = None


def read(text: str, source: str, folder: Path) -> Config:
    """The configuration in a file. Raises UserError for one that is none, or that trains another model."""
    script, launcher, values = parse_text(text, source)
    if "config_file" in values:
        file = found(str(values["config_file"]), folder, ".toml")
        if file is None:
            raise UserError(f"{source}: config_file={values['config_file']}: there is no such file; put it beside it")
        values = {**sections_merged(parse_toml(text_of(file, source, "config_file"), str(file))), **values}
    subsets: list[Subset] = []
    mixed: dict[str, list[Any]] = {}
    if (name := values.get("dataset_config")) and (file := found(str(name), folder)) is not None:
        settings, subsets, mixed = parse_dataset(
            parse_toml(text_of(file, source, "dataset_config"), str(file)), str(file)
        )
        values = {**values, **settings}
    return Config(script, values, folder, launcher, tuple(subsets), mixed)


def looks_like(text: str) -> bool:
    """Whether a text could be a configuration for sd-scripts."""
    return bool(re.search(r"pretrained_model_name_or_path|train_network|sdxl_train|network_module|network_dim", text))


def parse_text(text: str, source: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Script, arguments before it, and options, of a command line or a TOML file."""
    if not re.search(r"^[^#\n]*\.py\b|^\s*[\"']?--\w", text, re.MULTILINE):
        tree = parse_toml(text, source)
        if "datasets" in tree:
            raise UserError(
                f"{source}: datasets: is a dataset config; translate the file with the command line, with this one "
                "beside it"
            )
        return "sdxl_train_network.py", (), sections_merged(tree)
    words = command_words(text, source)
    place = next((i for i, word in enumerate(words) if script_of(word).endswith(".py")), None)
    script = "sdxl_train_network.py" if place is None else script_of(words[place])
    if script not in SDXL_SCRIPTS:
        raise UserError(
            f"{source}: {script}: does not fine-tune SDXL; only {', '.join(SDXL_SCRIPTS)} have a counterpart here"
        )
    return script, tuple(words[: place or 0]), parse_options(words[0 if place is None else place + 1 :])


def script_of(word: str) -> str:
    """The file name in a path, of Windows too."""
    return re.split(r"[/\\]", word)[-1]


def command_words(text: str, source: str) -> list[str]:
    """The words of the command in a script: the first line with a Python file, or with options."""
    joined = re.sub(r"[ \t]*[\\^`][ \t]*\r?\n", " ", text)
    lines = [line for line in joined.splitlines() if re.search(r"\.py\b|^\s*[\"']?--\w", line.split("#")[0])]
    if not lines:
        raise UserError(f"{source}: has no command with options of sd-scripts")
    # Options alone may stand on a line each.
    line = lines[0] if ".py" in lines[0] else " ".join(lines)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if re.search(r"[A-Za-z]:\\", line) or re.search(r"\^[ \t]*\r?\n", text):
        lexer.escape = ""  # a script for Windows, with backslashes in its paths
    try:
        return list(itertools.takewhile(lambda word: not word.startswith("#"), lexer))
    except ValueError as error:
        raise UserError(f"{source}: a quote is not closed ({error})") from error


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b` and `--switch` as a dict; the last of equal keys counts."""
    values: dict[str, Any] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            values[key] = [value] if equals else []
        elif key:
            values[key].append(word)
        elif word:
            values[word] = []
    return {key: True if not got else got[0] if len(got) == 1 else got for key, got in values.items()}


def parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source}: is neither a command line of sd-scripts, nor TOML, nor JSON ({error})") from error


def sections_merged(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Options of all sections as one dict: their names have no meaning to sd-scripts."""
    merged: dict[str, Any] = {}
    for key, value in tree.items():
        merged |= value if isinstance(value, dict) else {key: value}
    return merged


def parse_dataset(tree: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[Subset], dict[str, list[Any]]]:
    """The settings of a dataset config that all its images share, its folders, and settings with several values."""
    subsets: list[Subset] = []
    seen: dict[str, list[Any]] = {}
    for dataset in tree.get("datasets", []):
        shared = {**tree.get("general", {}), **{key: value for key, value in dataset.items() if key != "subsets"}}
        for entry in dataset.get("subsets", []):
            settings = {**shared, **entry}
            if "image_dir" not in settings:
                raise UserError(
                    f"{source}: datasets.subsets: one has no image_dir; only folders of images are translated"
                )
            subsets.append(
                Subset(
                    str(settings["image_dir"]),
                    int(settings.get("num_repeats", 1)),
                    settings.get("class_tokens"),
                    bool(settings.get("is_reg", False)),
                )
            )
            if not subsets[-1].is_reg:
                for key, value in settings.items():
                    values = seen.setdefault("train_batch_size" if key == "batch_size" else key, [])
                    values += [] if value in values else [value]
    if not subsets:
        raise UserError(f"{source}: datasets: has no subsets with images")
    settings = {key: values[0] for key, values in seen.items() if key not in OWN_KEYS}
    return settings, subsets, {key: values for key, values in seen.items() if key in settings and len(values) > 1}


def subsets_in(folder: str, base: Path, is_reg: bool = False) -> list[Subset]:
    """The subfolders `N_NAME` of a data folder, which stand for N repeats; empty if it is not on this machine."""
    place = found(folder, base)
    if place is None or not place.is_dir():
        return []
    names = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    matches = [match for name in names if (match := re.fullmatch(r"(\d+)_(.*)", name))]
    return [
        Subset(f"{folder.rstrip('/')}/{m[0]}", int(m[1]), m[2].strip() or None, is_reg)
        for m in matches
        if int(m[1]) > 0
    ]


def found(name: str, folder: Path, suffix: str = "") -> Path | None:
    """The file or folder of a path in a config: as it is, or relative to the config, or beside it."""
    names = [name, name + suffix] if suffix and not name.endswith(suffix) else [name]
    tried = (place / n for n in names for place in (Path(), folder))
    beside = (folder / script_of(n) for n in names)
    return next((path for path in (*tried, *beside) if exists(path)), None)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a text that is no path is none."""
    try:
        return path != Path() and path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def text_of(file: Path, source: str, key: str) -> str:
    """The text of a file that a config names. Raises UserError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: {key}={file}: cannot be read ({error})") from error
