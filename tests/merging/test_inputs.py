"""The files of a merge: how far they are hashed ahead, what leaves the page cache, and when."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from small_models import read
from tqdm import tqdm

from sdft.errors import UserError
from sdft.formats import stream
from sdft.formats.stream import Mapped, Stored
from sdft.merging import inputs, methods, sparse
from sdft.merging.inputs import InputFile, opened
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.merging.sources import open_source

Model = Callable[..., Path]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash a page at a time, and three pages ahead."""
    monkeypatch.setattr(stream, "CHUNK", 2**12)
    monkeypatch.setattr(inputs, "AHEAD", 3 * 2**12)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[InputFile]:
    """Those that are opened."""
    found: list[InputFile] = []
    begin = InputFile.__init__

    def note(file: InputFile, *arguments: object) -> None:
        begin(file, *arguments)
        found.append(file)

    monkeypatch.setattr(InputFile, "__init__", note)
    return found


def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[Stored]:
    """What is forgotten from now on."""
    found: list[Stored] = []
    forget = Mapped.forget

    def note(mapped: Mapped, stored: Stored) -> None:
        found.append(stored)
        forget(mapped, stored)

    monkeypatch.setattr(Mapped, "forget", note)
    return found


def test_every_tensor_is_forgotten_once_where_memory_is_short(
    model: Model, as_file: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    a, b, c = as_file(model("a", 0)), model("b", 1), model("c", 2)
    step = {"merged": Step(sparse.ties, {"base": str(a), "models": [str(b), str(c)]})}
    list(merge(step, str(tmp_path / "kept")))
    gone = forgotten(monkeypatch)
    monkeypatch.setattr(inputs, "available_memory", lambda: 0)
    list(merge(step, str(tmp_path / "forgotten")))
    views = [view for one in (a, b, c) for view in open_source("in", str(one)).checkpoint.weights.values()]
    assert sorted(gone, key=str) == sorted({view.stored for view in views}, key=str)
    kept, anew = (read(tmp_path / name) for name in ("kept", "forgotten"))
    assert all(torch.equal(kept[name], anew[name]) for name in kept)


def test_nothing_is_forgotten_where_memory_holds_all(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = forgotten(monkeypatch)
    step = Step(methods.weighted_sum, {"a": str(model("a", 0)), "b": str(model("b", 1))})
    list(merge({"merged": step}, str(tmp_path / "out")))
    assert gone == []


def test_what_is_forgotten_was_hashed_and_read_by_all(
    model: Model, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    seen: list[tuple[int, int, int]] = []
    forget = InputFile._forget

    def note(file: InputFile) -> None:
        before = set(file.not_hashed)
        forget(file)
        seen.extend((one.start + one.num_bytes, file.num_hashed, file.uses[one]) for one in before - {*file.not_hashed})

    monkeypatch.setattr(InputFile, "_forget", note)
    monkeypatch.setattr(inputs, "available_memory", lambda: 0)
    path = model("a")
    twice = {name: open_source(name, str(path)) for name in ("a", "again")}
    weights = list(twice["a"].checkpoint.weights)
    with opened(twice, tqdm(disable=True)) as found:
        for weight in weights:
            assert torch.equal(found.readers["a"](weight), found.readers["again"](weight))
            found.used(weight)
        for file in twice["a"].files:
            assert found.hash_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(seen) == len(weights)
    assert all(end <= hashed and uses == 0 for end, hashed, uses in seen)


def test_a_hash_is_little_ahead_of_what_was_read(
    model: Model, monkeypatch: pytest.MonkeyPatch, small_steps: None, files: list[InputFile]
) -> None:
    lead: list[float] = []
    sha256 = Mapped.sha256

    def note(mapped: Mapped, come_to: Callable[[int], object]) -> str:
        def told(end: int) -> None:
            lead.append(end - next(file.num_used for file in files if file.mapped is mapped))
            come_to(end)

        return sha256(mapped, told)

    monkeypatch.setattr(Mapped, "sha256", note)
    source = open_source("a", str(model("a")))
    with opened({"a": source}, tqdm(disable=True)) as found:
        for weight in source.checkpoint.weights:
            found.readers["a"](weight)
            found.used(weight)
        assert all(len(found.hash_of(file)) == 64 for file in source.files)
    assert max(lead) <= 4 * 2**12
    assert max(file.num_hashed for file in files) > 8 * 2**12, "the files are too small to tell"


def test_after_an_error_no_hash_goes_on(
    model: Model, tmp_path: Path, small_steps: None, files: list[InputFile]
) -> None:
    torn = {"unet/conv_in.bias": torch.full((6,), torch.nan)}
    step = Step(methods.weighted_sum, {"a": str(model("a", 0)), "b": str(model("nan", 1, **torn))})
    found: list[BaseException] = []

    def work() -> None:
        try:
            list(merge({"merged": step}, str(tmp_path / "out")))
        except UserError as error:
            found.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "is damaged" in str(found[0])
    longest = max(files, key=lambda file: len(file.mapped.content))
    assert longest.num_hashed < len(longest.mapped.content)
