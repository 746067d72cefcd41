"""A folder as people have them, PNG and JPEG of many sizes and shapes, from the first look to trained weights."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from sdft.data import __main__ as commands
from sdft.data.sources import ToyWorld

SHAPES = [(256, 160), (160, 256), (256, 256), (250, 100), (80, 64), (201, 199)]
"""Width and height"""


def write_pictures(root: Path) -> Path:
    """Eighteen scenes of the toy world: plain files, a turned photograph, ink, transparency, captions in two ways."""
    root.mkdir()
    world = ToyWorld(["photo", "dreamy"], 18, "train", size=256)
    rows = []
    for i in range(18):
        w, h = SHAPES[i % len(SHAPES)]
        picture = Image.fromarray(world[i].image_HWC)
        left, top = (256 - w) // 2, (256 - h) // 2
        picture = picture.crop((left, top, left + w, top + h))
        name, options = f"{i:02d}.png" if i % 2 else f"{i:02d}.jpg", {}
        if i == 6:
            picture = picture.rotate(90, expand=True)  # stored on its side; EXIF says how to turn it back
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        elif i == 8:
            picture = picture.convert("CMYK")
        elif i == 9:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(root / name, **options)
        if i < 12:
            (root / name).with_suffix(".txt").write_text(world[i].caption)
        else:
            rows.append(json.dumps({"file_name": name, "text": [world[i].caption, "a picture"]}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return root


def run(command, monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *words])
    command()
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_own_pictures_are_looked_at_cached_and_learned(tmp_path: Path, monkeypatch, capsys) -> None:
    root = write_pictures(tmp_path / "pictures")
    common = [f"data.root={root}", "size=128", "data.bucket_step=32"]

    told = run(commands.check, monkeypatch, capsys, *common, f"out={tmp_path}/sheets")
    assert "18, and 0 that cannot be read" in told
    assert "sizes            80 to 256 wide, 64 to 256 high" in told
    rows = [line.split() for line in told.splitlines() if re.match(r" +\d+ x \d+ ", line)]
    sizes = {f"{w} x {h}": int(num) for w, _, h, num, _ in rows}
    # 250 x 100 is 2.5 : 1, nearer to 160 x 96 than to 256 x 64; 80 x 64 and 201 x 199 are nearer to a square.
    assert sizes == {"160 x 96": 6, "128 x 128": 9, "96 x 160": 3}
    assert {file.name for file in (tmp_path / "sheets").glob("*.png")} == {"160x96.png", "128x128.png", "96x160.png"}

    cached = [*common, f"out={tmp_path}/cache"]
    run(commands.cache, monkeypatch, capsys, *cached)
    shards = sorted(file.name for file in (tmp_path / "cache").glob("*.safetensors"))
    assert shards

    words = ["data.cache=disk", f"data.cache_dir={tmp_path}/cache", "data.batch_size=4", "trainer.accelerator=cpu"]
    short = ["trainer.max_steps=2", "trainer.progress_bar=false", "verdict=none", "metric=null", "logger=csv"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = run(
        train.main, monkeypatch, capsys, "data=folder", *common, *words, *short, "callbacks=checkpoints",
        f"run_dir={tmp_path}/run", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert "    160x96: " in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_steps"] == 2
    assert 0 < summary["val/eps_mse"] < 2
    assert Path(summary["artifacts"]["lora"]).is_file()
    assert sorted(file.name for file in (tmp_path / "cache").glob("*.safetensors")) == shards, "all was found"
