"""How a command ends: exit codes, the message of an error that nobody foresaw, closed pipes, secrets left out.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error that sdft did not foresee; its traceback is in a file |
| 2 | the message says what to change: an option, a file, the disk, the memory |
| 75 | stopped by SIGUSR1 with everything saved; SLURM scripts queue the job again |
| 130, 143 | stopped by Ctrl-C (SIGINT), by SIGTERM |
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sdft.config.keys import items
from sdft.distributed.processes import ProcessInfo, exit_with_error
from sdft.errors import UserError
from sdft.formats.output import no_room

TRACEBACK = "traceback.txt"
"""In the run folder, or in a temporary one if there is none."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
           errno.ENOENT, errno.EEXIST)  # fmt: skip

_secrets: dict[str, str] = {}
"""Value of an environment variable that a config reads -> the interpolation that reads it."""


class Unbreakable:
    """A text stream that goes on, into nothing, when its reader has gone: `train.py | head -1` trains to its end."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # the name of a file that is not valid UTF-8
            encoding = self._stream.encoding or "utf-8"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase.flush`."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        # What is buffered goes the same way, also when Python flushes at its end.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)


@contextmanager
def unbreakable_streams() -> Iterator[None]:
    """Standard output and error survive a closed pipe inside of the context; our warnings are one line each."""
    before = sys.stdout, sys.stderr, warnings.formatwarning
    sys.stdout, sys.stderr = (Unbreakable(stream) for stream in before[:2])  # type: ignore[assignment]
    warnings.formatwarning = _formatted
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr, warnings.formatwarning = before


def _formatted(message: Any, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of this project without the line of code that it came from, which says nothing to a user."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {printable(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def hide_environment(cfg: DictConfig) -> None:
    """From now on `hidden` replaces the values of the environment variables that this config reads."""
    for text in _strings(OmegaConf.to_container(cfg, resolve=False)):
        for name in re.findall(r"\$\{oc\.env:\s*['\"]?(\w+)", text):
            value = os.environ.get(name, "")
            if len(value) > 3:  # shorter ones are numbers or switches, and would be found everywhere
                _secrets[value] = f"${{oc.env:{name}}}"


def hidden(tree: Any) -> Any:
    """A copy of a text, or of all texts in a tree, with interpolations for values that came from the environment."""
    if isinstance(tree, str):
        for value in sorted(_secrets, key=len, reverse=True):
            tree = tree.replace(value, _secrets[value])
        return tree
    if isinstance(tree, dict):
        return {key: hidden(value) for key, value in tree.items()}
    return [hidden(value) for value in tree] if isinstance(tree, list) else tree


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for _, value in items(tree):
        yield from _strings(value)


def printable(text: str) -> str:
    """The text with control characters escaped: names in a stranger's file could clear the screen, or set its title."""
    return "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text)


def foreseen(error: BaseException) -> UserError | None:
    """The message of an error that is the machine's rather than sdft's: a full disk, too little memory, no right."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "the GPU has too little memory: dry_run=true forecasts what a run needs; set a smaller batch_size, or "
            "model.gradient_checkpointing=true"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return UserError("this machine has too little memory; set a smaller batch_size or size")
    if no_room(error):
        return UserError(f"the disk is full{_of_file(error)}: free some space, and run the same command again")
    if isinstance(error, OSError) and error.errno in REFUSED:
        return UserError(f"{error.strerror}{_of_file(error)}: name another place, or change its permissions")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        for word in (word for word in sys.argv if word.startswith("~")):
            if word[1:].partition("=")[0].partition("@")[0].replace("/", ".") == error.full_key:
                return UserError(f"{word} leaves out what this command needs; remove it")
    return None


def _of_file(error: BaseException) -> str:
    file = getattr(error, "filename", None)
    return f" ({file})" if file else ""


def exit_for(error: BaseException, folder: Path | None = None) -> NoReturn:
    """Print the message of an error, and exit with its code; see this module. folder: of the run, if there is one.

    `SDFT_DEBUG=1` prints the traceback as well.
    """
    if os.environ.get("SDFT_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        if ProcessInfo.current().should_print("interrupted"):
            print("\ninterrupted: the same command starts again", file=sys.stderr, flush=True)
        raise SystemExit(130)
    known = foreseen(error)
    if known is not None:
        exit_with_error(UserError(printable(hidden(str(known)))))
    last_resort(error, folder)


def last_resort(error: BaseException, folder: Path | None) -> NoReturn:
    """Three lines about an error that nobody foresaw: what, where its traceback is, how to report it; exit code 1."""
    what = printable(hidden(" ".join(str(error).split())))[:300]
    name = type(error).__name__
    if ProcessInfo.current().should_print(f"{name}: {what}"):
        print(f"error: {name}: {what}" if what else f"error: {name}", file=sys.stderr)
        print(f"  its traceback is in {_logged(error, folder)}; SDFT_DEBUG=1 prints it", file=sys.stderr)
        print("  nobody foresaw this: please report it to the project with that file", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _logged(error: BaseException, folder: Path | None) -> Path | str:
    text = hidden("".join(traceback.format_exception(error)))
    for place in (folder, Path(tempfile.gettempdir())):
        if place is not None and place.is_dir():
            file = place / (TRACEBACK if place == folder else f"sdft_{os.getpid()}_{TRACEBACK}")
            try:
                file.write_text(text, encoding="utf-8")
            except OSError:
                continue
            return file
    return "no file, as none could be written"
