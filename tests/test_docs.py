"""The pages: their commands fit the configs of today, the site builds, and nothing is fetched when it is read."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checks import slow

from sdft.config.command import check, compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA = ("cache", "caption", "check", "edit", "mask", "shard", "tags", "toy")
COMMAND = re.compile(rf"^python (train\.py|eval\.py|-m sdft\.[a-z.]+(?: (?:{'|'.join(DATA)})\b)?) (.*)$")
ROOTS = {
    "train.py": "train",
    "eval.py": "eval",
    "-m sdft.merging": "merge",
    "-m sdft.merging.strip": "strip",
    "-m sdft.formats": "formats",
    "-m sdft.board": "board",
    "-m sdft.choosing": "choose",
    "-m sdft.publish": "publish",
    "-m sdft.models.nano": "nano",
    **{f"-m sdft.data {name}": f"data_{name}" for name in DATA},
}
OUTSIDE = ("--config-dir", "hydra.searchpath", "reproduce=")
"""Of commands that need more than this checkout: tests/test_extending.py, tests/training/test_receipt.py."""


def commands() -> dict[str, tuple[str, list[str]]]:
    """Command line -> root of its config and overrides, of all bash blocks; of a sweep its first job."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                text = re.split(r"\s{2,}#", line)[0].strip()
                match = COMMAND.match(text)
                if match and not any(part in text for part in OUTSIDE):
                    words = [word for word in shlex.split(match[2]) if not word.startswith("-")]
                    if match[1] == "-m sdft.board":
                        words[0] = f"in={words[0]}"
                    if "--cfg" in text:
                        words.remove("job")
                    if " -m " in match[2] or match[2].startswith("-m "):
                        words = [re.sub(r"^([+\w./]+=)([^\[{,']+),.*", r"\1\2", word) for word in words]
                    found[text] = ROOTS[match[1]], words
    return found


def test_the_pages_have_commands() -> None:
    found = commands()
    assert len(found) >= 50
    assert sum("model=sdxl" in text for text in found) >= 4


README = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [text if text in README else slow(text) for text in commands()])
def test_a_command_of_a_page_fits_the_configs(text: str) -> None:
    root, overrides = commands()[text]
    check(compose(root, overrides))


class Fetched(HTMLParser):
    """Collects what a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "embed"):
            self.found.append(values.get("src") or "")
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(values.get("href") or "")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs, as of make docs")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = list(tmp_path.rglob("*.html"))
    for name in ("index", "architecture", "extending", "python_api"):
        assert tmp_path / f"{name}.html" in pages
    reference = "".join(page.read_text(encoding="utf-8") for page in pages if "reference" in str(page))
    for name in ("sdft.protocols.Objective", "sdft.protocols.DiffusionModel", "sdft.api.finetune"):
        assert f'id="{name}"' in reference
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert not [source for source in parser.found if re.match(r"(https?:)?//", source)], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style
