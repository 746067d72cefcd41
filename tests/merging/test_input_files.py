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
from sdft.formats import safetensors_io
from sdft.formats.safetensors_io import MappedFile, StoredTensor
from sdft.merging import input_files, methods, sparsify
from sdft.merging.input_files import InputFile, open_inputs
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.merging.sources import open_source

Model = Callable[..., Path]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash a page at a time, and three pages ahead."""
    monkeypatch.setattr(safetensors_io, "CHUNK", 2**12)
    monkeypatch.setattr(input_files, "MAX_HASH_LEAD", 3 * 2**12)


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


def dropped_pages(monkeypatch: pytest.MonkeyPatch) -> list[StoredTensor]:
    """What is forgotten from now on."""
    found: list[StoredTensor] = []
    drop_pages = MappedFile.drop_pages

    def note(mapped: MappedFile, stored: StoredTensor) -> None:
        found.append(stored)
        drop_pages(mapped, stored)

    monkeypatch.setattr(MappedFile, "drop_pages", note)
    return found


def test_every_tensor_is_forgotten_once_where_memory_is_short(
    model: Model, as_file: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    a, b, c = as_file(model("a", 0)), model("b", 1), model("c", 2)
    step = {"merged": Step(sparsify.ties, {"base": str(a), "models": [str(b), str(c)]})}
    list(merge(step, str(tmp_path / "kept")))
    gone = dropped_pages(monkeypatch)
    monkeypatch.setattr(input_files, "available_memory", lambda: 0)
    list(merge(step, str(tmp_path / "forgotten")))
    views = [view for one in (a, b, c) for view in open_source("in", str(one)).checkpoint.weights.values()]
    assert sorted(gone, key=str) == sorted({view.stored for view in views}, key=str)
    kept, reread = (read(tmp_path / name) for name in ("kept", "forgotten"))
    assert all(torch.equal(kept[name], reread[name]) for name in kept)


def test_nothing_is_forgotten_where_memory_holds_all(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dropped_pages(monkeypatch)
    step = Step(methods.weighted_sum, {"a": str(model("a", 0)), "b": str(model("b", 1))})
    list(merge({"merged": step}, str(tmp_path / "out")))
    assert gone == []


def test_what_is_forgotten_was_hashed_and_read_by_all(
    model: Model, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> None:
    seen: list[tuple[int, int, int]] = []
    drop_pages = InputFile._drop_pages

    def note(file: InputFile) -> None:
        before = set(file.pages_to_drop)
        drop_pages(file)
        dropped = before - set(file.pages_to_drop)
        seen.extend((one.start + one.num_bytes, file.num_hashed, file.uses[one]) for one in dropped)

    monkeypatch.setattr(InputFile, "_drop_pages", note)
    monkeypatch.setattr(input_files, "available_memory", lambda: 0)
    path = model("a")
    twice = {name: open_source(name, str(path)) for name in ("a", "again")}
    weights = list(twice["a"].checkpoint.weights)
    with open_inputs(twice, tqdm(disable=True)) as found:
        for weight in weights:
            assert torch.equal(found.readers["a"](weight), found.readers["again"](weight))
            found.release(weight)
        for file in twice["a"].files:
            assert found.hash_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(seen) == len(weights)
    assert all(end <= hashed and uses == 0 for end, hashed, uses in seen)


def test_a_hash_is_little_ahead_of_what_was_read(
    model: Model, monkeypatch: pytest.MonkeyPatch, small_steps: None, files: list[InputFile]
) -> None:
    lead: list[float] = []
    sha256 = MappedFile.sha256

    def note(mapped: MappedFile, on_progress: Callable[[int], object]) -> str:
        def note_progress(end: int) -> None:
            lead.append(end - next(file.num_released for file in files if file.mapped is mapped))
            on_progress(end)

        return sha256(mapped, note_progress)

    monkeypatch.setattr(MappedFile, "sha256", note)
    source = open_source("a", str(model("a")))
    with open_inputs({"a": source}, tqdm(disable=True)) as found:
        for weight in source.checkpoint.weights:
            found.readers["a"](weight)
            found.release(weight)
        assert all(len(found.hash_of(file)) == 64 for file in source.files)
    assert max(lead) <= 4 * 2**12
    assert max(file.num_hashed for file in files) > 8 * 2**12, "the files are too small for this test"


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
