"""One set of pictures as a folder, as shards here and on a server, and as parquet: one run, to the bit.

`train.py` itself, in processes of their own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from checks import assert_equal
from safetensors.torch import load_file
from small_runs import Run, finish, start, train_py
from test_remote_shards import Server

from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, ToyWorld
from sdft.formats.training_checkpoint import read_state

NUM, STEPS = 16, 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names with dots, in folders; one picture has two captions."""
    from PIL import Image

    root = tmp_path_factory.mktemp("set") / "pictures"
    world = ToyWorld(["photo"], NUM, "train", size=64)
    for i in range(NUM):
        file = root / "ab"[i % 2] / f"scene.{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(world[i].image_HWC).save(file)
        file.with_suffix(".txt").write_text(world[i].caption)
    return root


@pytest.fixture(scope="module")
def server(pictures: Path) -> Iterator[Server]:
    write_shards(Folder(str(pictures), "all"), pictures.parent / "shards", per_shard=3)
    serving = Server(pictures.parent / "shards")
    yield serving
    serving.server.shutdown()


def parquet(pictures: Path) -> Path:
    import datasets

    source = Folder(str(pictures), "all")
    rows = {
        "image": [{"bytes": source[i].image.content(), "path": None} for i in range(NUM)],
        "text": [source[i].caption for i in range(NUM)],
        "file_name": list(source.keys),
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "file_name": datasets.Value("string")}
    folder = pictures.parent / "rows"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "train.parquet")
    return folder


def command(folder: Path, *words: str) -> partial:
    """`train.py` with what both runs share."""
    common = [
        f"trainer.max_steps={STEPS}",
        "trainer.validate_every=6",
        "callbacks.last.every=1",
        "verdict=none",
        "data.cache=off",
    ]
    common += ["~callbacks.previews", "logger=csv", "trainer.progress_bar=false", "resume=auto", "data.batch_size=2"]
    common += [f"data.cache_dir={folder}/cache", "data.flip=true", "data.held_out=0.2", "data.crop=random"]
    return partial(train_py, [*common, *words])


def learn(folder: Path, *words: str) -> Run:
    run = Run(folder)
    assert finish(start(run, function=command(folder, *words))) == [0]
    return run


def steps_of(run: Run) -> int:
    return read_state(run.last)["global_step"] if run.last.is_file() else 0


def assert_same_run(run: Run, expected: Run) -> None:
    """The weights and every logged figure."""
    assert_equal(load_file(run.folder / "lora.safetensors"), load_file(expected.folder / "lora.safetensors"), "weights")
    found, wanted = (figures(one.folder) for one in (run, expected))
    assert found == wanted


def figures(folder: Path) -> list[tuple[str, ...]]:
    """The losses of the log, without times."""
    import csv

    (log,) = folder.rglob("metrics.csv")
    with log.open() as opened:
        rows = list(csv.DictReader(opened))
    names = [name for name in rows[0] if "loss" in name or name == "step"]
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.slow
def test_the_same_run_from_everywhere(pictures: Path, server: Server, tmp_path: Path) -> None:
    folder = learn(tmp_path / "folder", "data=folder", f"data.root={pictures}")
    assert any(any(row[1:]) for row in figures(folder.folder)), "losses are in the log"
    names = "{000000..000005}.tar"
    local = learn(tmp_path / "local", "data=webdataset", f"data.shards='{pictures.parent}/shards/{names}'")
    assert_same_run(local, folder)
    http = learn(tmp_path / "http", "data=webdataset", f"data.shards='{server.url}/{names}'")
    assert_same_run(http, folder)
    rows = learn(tmp_path / "rows", "data=huggingface", f"data.name={parquet(pictures)}", "data.key=file_name")
    assert_same_run(rows, folder)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_slow_shard(pictures: Path, server: Server, tmp_path: Path) -> None:
    """The space is that of two shards, and each comes slowly: the run is killed while it waits for one."""
    size = max(file.stat().st_size for file in (pictures.parent / "shards").glob("*.tar"))
    words = ["data=webdataset", f"data.shards='{server.url}/{{000000..000005}}.tar'", "data.shuffle_shards=1"]
    words += [f"data.cache_limit_gb={2.5 * size / 1e9}"]
    straight = learn(tmp_path / "straight", *words)
    server.pause = 0.3
    killed = Run(tmp_path / "killed")
    (process,) = start(killed, function=command(killed.folder, *words))
    while process.is_alive() and not (steps_of(killed) >= 3 and server.answering):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert finish([process]) == [-9]
    assert 3 <= steps_of(killed) < STEPS
    assert list((killed.folder / "cache" / "shards_partial").glob("*.tar")), "a shard was on its way"
    server.pause = 0.0
    assert_same_run(learn(killed.folder, *words), straight)
