"""A resumed run says what has changed in its images since the checkpoint, and goes on only when it is told to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_runs import Run, finish, start, train_py

from sdft.data.datamodule import Images
from sdft.data.inventory import Inventory
from sdft.data.sources import Folder
from sdft.errors import UserError
from sdft.formats.training_checkpoint import read_state


def draw(root: Path, name: str, seed: int, caption: str) -> None:
    root.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{name}.png")
    (root / f"{name}.txt").write_text(caption)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        draw(tmp_path / "pictures", f"{i}", i, f"picture {i}")
    return tmp_path / "pictures"


def images(root: Path, batch_size: int = 2, accumulate: int = 1, world_size: int = 1) -> Images:
    source = Folder(str(root), "all")
    data = Images(source, source, batch_size, 32, cache="off")
    data.trainer = SimpleNamespace(
        global_step=3, accumulate_grad_batches=accumulate, world_size=world_size, is_global_zero=True
    )
    return data


CHANGES = {
    "added": (lambda root: draw(root, "new", 9, "x"), r"1 added \(new\.png\)"),
    "removed": (lambda root: (root / "2.png").unlink(), r"1 removed \(2\.png\)"),
    "another picture": (lambda root: draw(root, "3", 8, "picture 3"), r"1 edited \(3\.png\)"),
    "another caption": (lambda root: (root / "4.txt").write_text("x"), r"1 edited \(4\.png\)"),
    "several": (
        lambda root: [(root / "0.png").unlink(), *(draw(root, f"n{i}", i, "x") for i in range(7))],
        r"7 added \(n0\.png, n1\.png, n2\.png, n3\.png, n4\.png, \.\.\.\), 1 removed \(0\.png\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_told(name: str, root: Path, capsys) -> None:
    change, told = CHANGES[name]
    state = images(root).state_dict()
    images(root).load_state_dict(state)
    change(root)
    data = images(root)
    message = rf"^resume: the checkpoint was saved with other data: {told}; .*resume_with_changed_data=true"
    with pytest.raises(UserError, match=message):
        data.load_state_dict(state)
    data.resume_with_changed_data = True
    data.load_state_dict(state)
    assert "the data have changed since the checkpoint: " in capsys.readouterr().out
    assert data._batches_done == 3


def test_another_effective_batch_is_told(root: Path) -> None:
    state = images(root, 2).state_dict()
    for same in (images(root, 1, accumulate=2), images(root, 1, world_size=2)):
        same.load_state_dict(state)
    with pytest.raises(UserError, match=r"other data: 4 images a step instead of 2; "):
        images(root, 2, accumulate=2).load_state_dict(state)


def test_an_inventory_is_small_and_kept_whole(root: Path) -> None:
    source = Folder(str(root), "all")
    scan = Images(source, source, 2, 32).train_scan
    found = Inventory.of(source, scan)
    again = Inventory.from_state(found.state())
    assert list(again.keys) == list(found.keys)
    assert found.changes_since(again) == []
    many = Inventory([f"folder/picture_{i:08d}.jpg" for i in range(10_000)], np.arange(10_000, dtype=np.uint64))
    assert sum(map(len, many.state().values())) < 20 * 10_000
    assert Inventory([], np.array([], np.uint64)).changes_since(Inventory.from_state(found.state())) == [
        "6 removed (0.png, 1.png, 2.png, 3.png, 4.png, ...)"
    ]


def test_another_mask_is_an_edit(root: Path) -> None:
    for i in range(6):
        Image.new("L", (32, 32), 200).save(root / f"{i}.mask.png")
    source = Folder(str(root), "all")
    scan = Images(source, source, 2, 32).train_scan
    before = Inventory.of(source, scan, masks=True)
    Image.new("L", (32, 32), 100).save(root / "3.mask.png")
    assert Inventory.of(source, scan, masks=True).changes_since(before) == ["1 edited (3.png)"]
    assert Inventory.of(source, scan).changes_since(Inventory.of(source, scan)) == []


def test_checkpoints_of_earlier_versions_are_taken(root: Path) -> None:
    images(root).load_state_dict({"batches_done": 5})


@pytest.mark.slow
def test_a_run_asks_before_it_goes_on_with_other_pictures(root: Path, tmp_path: Path, capfd) -> None:
    words = ["trainer.validate_every=2", "callbacks.last.every=2", "verdict=none", "data=folder", f"data.root={root}"]
    words += ["~callbacks.previews", "logger=csv", "trainer.progress_bar=false", "resume=auto", "data.batch_size=2"]
    run = Run(tmp_path / "run")
    assert finish(start(run, function=partial(train_py, [*words, "trainer.max_steps=2"]))) == [0]
    draw(root, "new", 9, "a new one")
    assert finish(start(run, function=partial(train_py, [*words, "trainer.max_steps=4"]))) != [0]
    assert "saved with other data: 1 added (new.png); " in capfd.readouterr().err
    assert read_state(run.last)["global_step"] == 2, "nothing was overwritten"
    words += ["trainer.max_steps=4", "resume_with_changed_data=true"]
    assert finish(start(run, function=partial(train_py, words))) == [0]
    assert read_state(run.last)["global_step"] == 4
