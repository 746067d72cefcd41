"""Translate a config of another trainer: `python -m sdft.training.translate train.sh`.

Reads command lines and TOML of kohya's sd-scripts, and JSON of OneTrainer; `-` is standard input. Prints a command line
of sdft, and below it as comments everything that has no counterpart, or will differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sdft.errors import UserError
from sdft.training.translate import kohya, kohya_files, onetrainer
from sdft.training.translate.command_line import Command, printable

USAGE = "usage: python -m sdft.training.translate FILE [FILE ...]; - is standard input"
LARGEST = 10_000_000
"""Bytes; configs have some thousands."""


def main() -> None:
    """The command: exit status 2 and a message for files that cannot be translated."""
    files = sys.argv[1:]
    if not files or files[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if files else 2)
    try:
        for file in files:
            print(translated(file).text(file if len(files) > 1 else ""), end="", flush=True)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        from sdft.config.exits import exit_for  # imports torch, which takes seconds

        exit_for(error)


def translated(file: str) -> Command:
    """The command of a file, or of standard input for `-`. Raises UserError for one that cannot be translated."""
    if file == "-":
        return translate(sys.stdin.read(), "standard input", Path())
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file}: there is no such file")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{file}: is too large for a config")
    try:
        return translate(path.read_text(encoding="utf-8-sig"), file, path.parent)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text ({error.reason}); the config of a trainer is") from error


def translate(text: str, source: str, folder: Path) -> Command:
    """The command of a config. source: its name in messages. folder: where files that it names are looked for."""
    if text.lstrip().startswith(("{", "[{")):
        return onetrainer.translate(onetrainer.read(text, source), source, folder)
    if not kohya_files.looks_like(text):
        raise UserError(
            f"{source}: is neither a config of OneTrainer (JSON) nor of sd-scripts (a command line or TOML)"
        )
    return kohya.translate(text, source, folder)


if __name__ == "__main__":
    main()
