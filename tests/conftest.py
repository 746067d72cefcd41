"""What all tests share: no network, few threads, and a tiny SDXL (`tiny.py`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# One thread for each process, and for every process that a test starts: workers and ranks share the cores, and
# OpenMP's threads wait for each other by spinning, which makes two processes of two threads ten times slower.
# Set before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import TinySource, build_tiny_batch, build_tiny_model
from warm import WarmPython

from benchmarks.synthetic import Synthetic, write_synthetic
from sdft.batch import Batch
from sdft.models.sdxl import SDXL

torch.set_num_threads(1)
LOCAL = {"file", "data", "blob"}


@pytest.hookimpl(trylast=True)  # after those that are left out by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest tests first, so that no worker ends alone with one of them.

    Each worker of pytest-xdist starts with an equal share of the tests, in their order: each share begins with some of
    the pages of documentation, whose commands take minutes.
    """
    items.sort(key=lambda item: "slow" not in item.keywords)
    pages = [item for item in items if item.originalname == "test_the_commands_of_a_page_run"]  # type: ignore[attr-defined]
    others = [item for item in items if item not in pages]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    shares = [slice(len(others) * n // workers, len(others) * (n + 1) // workers) for n in range(workers)]
    items[:] = [item for n, share in enumerate(shares) for item in (*pages[n::workers], *others[share])]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., SDXL]:
    """Builds a tiny SDXL: `tiny_model(seed=0, empty_prompt="zeros")`."""
    return build_tiny_model


@pytest.fixture(scope="session")
def thin_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """SDXL with all of its tensors and names, and an eighth of its widths."""
    return write_synthetic(tmp_path_factory.mktemp("thin"), divisor=8)


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., Batch]:
    """Builds a batch for it: `tiny_batch(num=2, dropped=(1,), ...)`."""
    return build_tiny_batch


@pytest.fixture(scope="session")
def tiny_source() -> Callable[..., TinySource]:
    """Builds a source of noisy pictures held in memory: `tiny_source(num=6)`."""
    return TinySource


@pytest.fixture(scope="session")
def python() -> Iterator[WarmPython]:
    """Runs commands as a shell would, in a fraction of the time."""
    with WarmPython() as python:
        yield python


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Opens a file; at the end, there was no complaint on the console, no pop-up, and no request left the machine."""
    complaints, addresses, contexts = [], [], []

    def open_page(path: Path, before: str = "", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("console", lambda message: complaints.append(message.text))
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        context.on("request", lambda request: addresses.append(request.url))
        context.set_default_timeout(20_000)
        if before:
            context.add_init_script(before)
        page = context.new_page()
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert addresses
    assert {urlsplit(address).scheme for address in addresses} <= LOCAL


@pytest.fixture
def open_again() -> Callable:
    """Opens the file of a page in another tab: `open_again(page)`.

    Chromium (156) gives about one in fifty documents of a busy machine a local storage that is empty and is not kept,
    also after a reload; such a tab is opened once more.
    """

    def open_again(page):
        storage = "JSON.stringify(Object.entries(localStorage).sort())"
        for _ in range(20):
            again = page.context.new_page()
            again.goto(page.url)
            if again.evaluate(storage) == page.evaluate(storage):
                return again
            again.close()
        pytest.fail("another tab does not see what the page stored")

    return open_again
