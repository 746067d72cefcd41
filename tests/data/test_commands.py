"""`python -m sdft.data check | cache | shard`, on a folder with one of every trouble."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data import __main__ as commands
from sdft.data.sources import ToyWorld
from sdft.data.summary import NEAR, difference_hash, near_groups
from sdft.errors import UserError
from sdft.models.tokens import token_counter


def run(command: str, capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [command, *words])
    commands.COMMANDS[command]()
    return capsys.readouterr().out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two wide pictures, one of them there twice, one nearly; a high one, one that is broken, one without caption."""
    folder = tmp_path / "in"
    folder.mkdir()
    g = np.random.default_rng(1)
    smooth = Image.fromarray(g.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    smooth.save(folder / "a.png")
    (folder / "a_again.png").write_bytes((folder / "a.png").read_bytes())
    smooth.resize((180, 120)).save(folder / "a_larger.jpg", quality=80)
    Image.fromarray(g.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(folder / "high.png")
    Image.fromarray(g.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "bare.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("a", "a_again", "a_larger", "broken"):
        (folder / f"{name}.txt").write_text("a red cat")
    (folder / "high.txt").write_text(" ".join(["a very long caption"] * 30))
    return folder


def test_check_tells_what_there_is(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = [f"data.root={root}", f"out={tmp_path}/sheets", "size=64", "data.bucket_step=16"]
    told = run("check", capsys, monkeypatch, *words)
    lines = {line.split("  ")[0].strip(): line for line in told.splitlines()}
    assert "5, and 1 that cannot be read" in lines["images"]
    assert f"{root}/broken.png (not a known image format)" in told
    assert "20 to 180 wide, 30 to 120 high, median 90 x 60" in told
    assert "1: a.png = a_again.png" in lines["duplicates"]
    assert "1: a.png = a_larger.jpg" in lines["near-duplicates"]
    assert "1: bare.png" in lines["without caption"]
    assert "1: high.png" in lines["over 77 tokens"]
    assert "1: high.png" in lines["enlarged"]
    sizes = [line.split()[:4] for line in told.splitlines() if " x " in line and line.startswith("     ")]
    assert sizes == [["80", "x", "48", "3"], ["64", "x", "64", "1"], ["48", "x", "80", "1"]]
    sheets = {file.name: Image.open(file).size for file in (tmp_path / "sheets").glob("*.png")}
    assert sheets.keys() == {"80x48.png", "64x64.png", "48x80.png"}
    assert sheets["80x48.png"][0] > 2 * sheets["64x64.png"][0], "three pictures stand beside each other"


def test_check_counts_what_the_chosen_model_reads(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = [f"data.root={root}", f"out={tmp_path}/sheets", "size=64", "data.bucket_step=16"]
    told = run("check", capsys, monkeypatch, *words, "model=sdxl", "model.weights=nano", "model.prompt_chunks=9")
    assert "over 677 tokens  none" in told
    assert "tokens" not in run("check", capsys, monkeypatch, *words, "~model")
    file = tmp_path / "one.safetensors"
    file.touch()
    for weights, key in (("no/where", "model.weights=no/where"), (str(file), "model.config=no/one")):
        with pytest.raises(UserError, match=f"{key}: not found on this machine"):
            token_counter(weights, "no/one")
    with pytest.raises(UserError, match=f"model.weights={tmp_path}: has no folder 'tokenizer'; pass .* or ~model"):
        token_counter(str(tmp_path), "nano")


def test_a_cache_is_filled_once(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = [f"data.root={root}", f"out={tmp_path}/cache", "data.default_caption=x", "data.unreadable=skip"]
    told = run("cache", capsys, monkeypatch, *words)
    # Five pictures, two of them the same; four captions with the empty one.
    assert f"8 entries in {tmp_path}/cache" in told
    before = sorted((file.name, file.stat().st_mtime_ns) for file in (tmp_path / "cache").glob("*.safetensors"))
    assert before
    run("cache", capsys, monkeypatch, *words)
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (tmp_path / "cache").glob("*.safetensors")) == before


def test_shard_refuses_what_is_broken_and_writes_the_rest(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = [f"root={root}", f"out={tmp_path}/out", "default_caption=x", "per_shard=3"]
    with pytest.raises(SystemExit):
        run("shard", capsys, monkeypatch, *words)
    assert "broken.png cannot be read as an image" in capsys.readouterr().err
    (root / "broken.png").unlink()
    told = run("shard", capsys, monkeypatch, *words)
    assert "5 images in 2 shards" in told
    assert f"data.shards='{tmp_path}/out/{{000000..000001}}.tar'" in told
    names = ["000000.tar", "000000.tar.index.jsonl", "000001.tar", "000001.tar.index.jsonl", "shards.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names


def test_hashes_see_likeness() -> None:
    """In a ramp from dark to light each of 64 cells is darker than its right neighbour; mirrored, none is."""
    ramp = np.tile(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], (80, 1, 3))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp[:, ::-1]) == 0


def test_hashes_of_copies_are_near_and_of_other_pictures_far() -> None:
    """Six pictures, each at half size and as a JPEG of quality 90, against the five others."""
    world = ToyWorld(["photo"], 6, "test", size=512)
    pictures = [world[index].image_HWC for index in range(6)]
    for number, picture in enumerate(pictures):
        stored = io.BytesIO()
        Image.fromarray(picture).resize((256, 256)).save(stored, "jpeg", quality=90)
        copy = difference_hash(np.asarray(Image.open(stored)))
        distances = [(copy ^ difference_hash(other)).bit_count() for other in pictures]
        assert distances.pop(number) <= NEAR < min(distances)


def test_near_groups_are_those_within_reach() -> None:
    """Against comparing all pairs, on hashes made to be near."""
    g = np.random.default_rng(0)
    centres = [int(x) for x in g.integers(0, 2**63, 20)]
    hashes = {}
    for c, centre in enumerate(centres):
        for k in range(3):
            bits = g.choice(64, size=2 * k, replace=False)
            hashes[f"{c}-{k}"] = centre ^ sum(1 << int(bit) for bit in bits)
    groups = {frozenset(group) for group in near_groups(hashes)}
    for a in hashes:
        for b in hashes:
            if a != b and (hashes[a] ^ hashes[b]).bit_count() <= NEAR:
                assert any({a, b} <= group for group in groups)
    assert groups == {frozenset(f"{c}-{k}" for k in range(3)) for c in range(20)}
    assert near_groups({"a": 5, "b": 5}, known=[["a", "b"]]) == []


def test_check_goes_on_to_the_pictures_when_captions_are_wrong(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Everything that is wrong is told at once, and the exit status says so."""
    (root / "a.txt").write_bytes(b"caf\xe9")
    (root / "high.txt").write_text("")
    (root / "metadata.jsonl").write_text('{"file_name": "bare.png", "text": 3}\n{oops\n')
    with pytest.raises(SystemExit):
        run("check", capsys, monkeypatch, f"data.root={root}", f"out={tmp_path}/sheets", "size=64")
    told = capsys.readouterr()
    assert "5, and 1 that cannot be read" in told.out
    assert f"{root}/broken.png (not a known image format)" in told.out
    assert "a.png has a caption that is not UTF-8 (byte 3 of a.txt)" in told.err
    assert "metadata.jsonl line 1 has a caption that is neither text nor a list" in told.err
    assert "metadata.jsonl line 2 is not JSON" in told.err
    assert list((tmp_path / "sheets").glob("*.png"))
