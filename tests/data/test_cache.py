"""What is kept on disk: exactly what changed is made again, and nothing damaged or stale is ever read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdft.data.cache import Cache, checksum, fingerprint
from sdft.data.captions import Tags
from sdft.data.datamodule import Images
from sdft.data.dataset import collate
from sdft.data.encoding import Ranks, cached_moments
from sdft.data.sources import Folder
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter

NUM = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six captioned pictures of three shapes; one is held out."""
    g = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, hw in enumerate([(40, 60), (60, 40), (48, 48)] * 2):
        Image.fromarray(g.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a red cat", "a dog", "the table", "neon lines", "a photo", "glowing"][i])
    return folder


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def images(root: Path, cache_dir: Path, size: int = 32, cache: str = "disk", **options) -> Images:
    tags = options.pop("tags", None)
    parts = [Folder(str(root), split, 0.1, tags=tags) for split in ("train", "validation")]
    return Images(*parts, 2, size, cache=cache, cache_dir=str(cache_dir), **options)


def prepare(model, data: Images) -> tuple[int, int]:
    """Fills the cache; how many pictures and captions had to be encoded."""
    count = [0, 0]

    def encode(pixels):
        count[0] += len(pixels)
        return model.encode_moments(pixels)

    def prompts(captions):
        count[1] += len(captions)
        return model.encode_prompts(captions)

    data.encode_once(encode, torch.device("cpu"), vae=model.vae)
    data.encode_texts_once(prompts, model.prompt_ids, model.text_encoder, model.text_encoder_2)
    return count[0], count[1]


def examples(data: Images) -> Iterator[dict]:
    for pictures in (data.train_set, data.validation_set):
        for index in range(len(pictures.source.keys)):
            yield pictures[index, 0]


class TestContent:
    def test_exactly_what_changed_is_made_again(self, root: Path, tmp_path: Path, model, tiny_model) -> None:
        """Seven captions: the six, and the empty one of dropped captions."""

        def made(used=model, **options) -> tuple[int, int]:
            return prepare(used, images(root, tmp_path / "cache", **options))

        assert made() == (NUM, NUM + 1)
        assert made() == (0, 0)
        os.utime(root / "0.png", (1, 1))
        assert made() == (0, 0), "a date says nothing of the content"
        (root / "1.txt").write_text("a red dog")
        assert made() == (0, 1)
        (root / "1.txt").write_text("  a red\n dog ")
        assert made() == (0, 0), "the encoders read the same"
        before = (root / "2.png").read_bytes()
        image = np.asarray(Image.open(root / "2.png")).copy()
        image[0, 0, 0] ^= 1
        Image.fromarray(image).save(root / "2.png")
        assert made() == (1, 0)
        (root / "2.png").write_bytes(before)
        assert made() == (0, 0), "what was made before is found again"
        assert made(size=48) == (NUM, 0)
        assert made(bucket_step=16, size=64) == (NUM, 0)
        assert made(flip=True) == (NUM - 1, 0), "only training pictures are mirrored"
        other = tiny_model()
        other.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
        assert made(other) == (NUM, 0)
        other = tiny_model()
        other.text_encoder.get_input_embeddings().weight.data[3, 0] += 1e-3
        assert made(other) == (0, NUM + 1)

    def test_what_is_read_is_what_was_encoded(self, root: Path, tmp_path: Path, model) -> None:
        """Bit for bit, in this process and in the next; text up to the rounding of another batch size."""
        data, again, ram = (images(root, tmp_path / "c", cache=c, flip=True) for c in ("disk", "disk", "ram"))
        prepare(model, data)
        prepare(model, again)
        ram.encode_once(model.encode_moments, torch.device("cpu"))
        for kept, later, live in zip(examples(data), examples(again), examples(ram), strict=True):
            assert torch.equal(kept["moments_BCHW"], live["moments_BCHW"])
            assert torch.equal(kept["time_ids_B6"], live["time_ids_B6"])
            context, pooled = model.encode_prompts([kept["captions"]])
            torch.testing.assert_close(kept["context_BLD"], context[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kept["pooled_BP"], pooled[0], rtol=1e-5, atol=1e-5)
            for name in ("moments_BCHW", "context_BLD", "pooled_BP"):
                assert torch.equal(kept[name], later[name]), name

    @pytest.mark.parametrize("empty_prompt", ["zeros", "empty"])
    @pytest.mark.parametrize("encoder_dropout", [None, (0.4, 0.4)])
    def test_dropped_captions_are_conditioned_as_if_encoded(
        self, encoder_dropout, empty_prompt, root: Path, tmp_path: Path, tiny_model
    ) -> None:
        model = tiny_model(empty_prompt=empty_prompt)
        data = images(root, tmp_path / "c", caption_dropout=0.4, encoder_dropout=encoder_dropout)
        prepare(model, data)
        batch = collate([data.train_set[i, visit] for i in range(5) for visit in range(4)])
        silent = {tuple(row) for row in batch.dropped_by_encoder_BE.tolist()}
        assert len(silent) == (4 if encoder_dropout else 2)
        cached = model.condition(batch)
        batch.context_BLD = batch.pooled_BP = None
        live = model.condition(batch)
        torch.testing.assert_close(cached.context_BLD, live.context_BLD, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cached.pooled_BP, live.pooled_BP, rtol=1e-5, atol=1e-5)

    def test_tags_that_vary_are_encoded_live(self, root: Path, tmp_path: Path, model) -> None:
        data = images(root, tmp_path / "c", tags=Tags(shuffle=True))
        assert prepare(model, data) == (NUM, 0)
        assert data.train_set.text_embeddings is None

    def test_pictures_are_not_read_again(self, root: Path, tmp_path: Path, model) -> None:
        data = images(root, tmp_path / "c")
        prepare(model, data)
        expected = list(examples(data))
        for file in root.glob("*.png"):
            file.unlink()
        for a, b in zip(examples(data), expected, strict=True):
            assert torch.equal(a["moments_BCHW"], b["moments_BCHW"])

    def test_what_is_expected_is_what_is_read(self, root: Path, tmp_path: Path, model, monkeypatch) -> None:
        data = images(root, tmp_path / "c", flip=True, caption_dropout=0.3, encoder_dropout=(0.3, 0.3))
        prepare(model, data)
        items = [(index, visit) for index in range(5) for visit in range(6)]
        told, asked, read = [], set(), Cache._read
        monkeypatch.setattr(Cache, "_read", lambda *place: told.append(place[1]) or read(*place))
        monkeypatch.setattr(os, "posix_fadvise", lambda _, first, size, __: asked.add((first, size)))
        data.train_set.prefetch(items)
        assert not asked, "it is in memory, having just been written"
        monkeypatch.setattr(Cache, "_in_memory", lambda *place: False)
        data.train_set.prefetch(items)
        assert not told
        _ = [data.train_set[item] for item in items]
        assert {(place.first, place.kind.size) for place in told} == asked

    def test_a_folder_is_needed(self, root: Path, tiny_source) -> None:
        with pytest.raises(UserError, match=r"data.cache=disk: set data.cache_dir=DIR"):
            Images(tiny_source(2), tiny_source(2), 2, 32, cache="disk")


class TestRuns:
    def test_a_run_from_the_cache_is_the_run(self, root: Path, tmp_path: Path, tiny_model) -> None:
        """Text states are kept where no encoder learns; the losses are those of a run that encodes live."""

        def fit(cache: str, parts: tuple[str, ...]) -> tuple[float, bool]:
            data = images(root, tmp_path / "c", cache=cache, caption_dropout=0.3, flip=True)
            module = Finetuning(tiny_model(), Adapter(rank=2, parts=parts), Denoising(), adamw_1e3, constant, seed=0)
            options = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "progress_bar": False}
            run = trainer(max_steps=1, run_dir=str(tmp_path), **options)
            run.fit(module, data)
            return float(run.callback_metrics["train/loss"]), data.train_set.text_embeddings is not None

        live, built, read = (fit(cache, ("unet",)) for cache in ("off", "disk", "disk"))
        assert (live[1], built[1], read[1]) == (False, True, True)
        assert built[0] == pytest.approx(live[0], rel=1e-4)
        assert read[0] == built[0]
        assert not fit("disk", ("unet", "text_encoder", "text_encoder_2"))[1]

    def test_ranks_share_the_work(self, root: Path, tmp_path: Path, model) -> None:
        """Three ranks at once make each entry once and all end with all of them."""
        made: list[list] = [[], [], []]
        found: list = [None] * 3
        barrier = threading.Barrier(3)
        data = images(root, tmp_path / "c", flip=True)

        def rank(number: int) -> None:
            def make(variants):
                made[number] += variants
                return [(v, torch.full((2,), float(v[0] + 10 * v[1]))) for v in variants]

            parts = (data.train_set, data.train_scan, make, Ranks(number, 3, barrier.wait))
            found[number] = cached_moments(Cache(tmp_path / "c"), "vae", *parts)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        variants = list(data.train_set.cacheable_variants())
        assert sorted(chain.from_iterable(made)) == sorted(variants)
        for moments in found:
            assert [float(moments[v][0]) for v in variants] == [v[0] + 10.0 * v[1] for v in variants]


def adamw_1e3(groups):
    return adamw(groups, lr=1e-3)


def filled(folder: Path, num: int = 4) -> Cache:
    cache = Cache(folder)
    for i in range(num):
        cache.put(f"{i:08x}", torch.arange(5.0) + i)
    cache.flush()
    return cache


class TestShards:
    def test_every_flipped_byte_is_found_and_its_shard_named(self, tmp_path: Path) -> None:
        """Each byte in turn: the file is named, or (a letter of a name) the entry is not there any more."""
        filled(tmp_path, 2)
        (shard,) = tmp_path.glob("*.safetensors")
        whole = shard.read_bytes()
        named = []
        values = {f"{i:08x}": torch.arange(5.0) + i for i in range(2)}
        for place in range(0, len(whole), 3):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
            try:
                cache = Cache(tmp_path)
                for address in set(values) - set(cache.missing(values)):
                    assert torch.equal(cache[address], values[address]), place
            except UserError as error:
                named.append(str(shard) in str(error) and "remove this file" in str(error))
        assert len(named) > 20
        assert all(named)
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        cache = Cache(tmp_path)
        with pytest.raises(UserError, match=rf"{shard} is damaged"):
            _ = [cache[address] for address in values]

    def test_a_cut_shard_is_named(self, tmp_path: Path) -> None:
        filled(tmp_path)
        (shard,) = tmp_path.glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(UserError, match=rf"{shard} is damaged"):
            Cache(tmp_path)

    def test_a_removed_shard_is_made_again(self, root: Path, tmp_path: Path, model) -> None:
        cache = tmp_path / "cache"
        prepare(model, images(root, cache))
        for shard in cache.glob("*.safetensors"):
            shard.unlink()
        assert prepare(model, images(root, cache)) == (NUM, NUM + 1)

    def test_a_killed_build_goes_on(self, tmp_path: Path) -> None:
        """kill -9 while shards of two entries are written: what was whole is there, the rest is missing."""
        script = (
            "import sys, time, torch\nfrom sdft.data.cache import Cache\n"
            "cache = Cache(sys.argv[1], shard_bytes=2000)\n"
            "for i in range(1000):\n    cache.put(f'{i:08x}', torch.full((250,), float(i)))\n    time.sleep(0.02)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        cache = Cache(tmp_path, shard_bytes=2000)
        addresses = [f"{i:08x}" for i in range(12)]
        missing = cache.missing(addresses)
        assert len(cache) >= 6
        assert len(missing) <= 6
        for address in missing:
            cache.put(address, torch.full((250,), float(int(address, 16))))
        cache.flush()
        assert Cache(tmp_path).missing(addresses) == []
        assert all(float(cache[address][7]) == int(address, 16) for address in addresses)

    def test_a_full_disk_is_told_and_loses_nothing(self, tmp_path: Path) -> None:
        """A limit of the size of files stands for the full disk: the same call fails in the same way."""
        script = (
            "import resource, sys, torch\nfrom sdft.data.cache import Cache\nfrom sdft.errors import UserError\n"
            "cache = Cache(sys.argv[1])\ncache.put('0000000a', torch.ones(9))\ncache.flush()\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\ncache.put('0000000b', torch.ones(9999))\n"
            "try:\n    cache.flush()\nexcept UserError as error:\n    print(error)\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "cannot be written (File too large); the 1 entries written before are kept" in done.stdout, done.stderr
        assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
        assert torch.equal(Cache(tmp_path)["0000000a"], torch.ones(9))

    def test_types_and_shapes_are_kept(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        kept = {"a0": torch.rand(2, 3).bfloat16(), "b0": torch.rand(4, 1, 2), "c0": torch.rand(3, 4).T}
        for address, tensor in kept.items():
            cache.put(address, tensor)
        cache.flush()
        for address, tensor in kept.items():
            assert cache[address].dtype == tensor.dtype
            assert torch.equal(cache[address], tensor)


def test_a_fingerprint_sees_every_weight(tiny_model) -> None:
    one, two = tiny_model().vae, tiny_model().vae
    assert fingerprint(one) == fingerprint(two)
    list(two.parameters())[-1].data[0] += 1e-7
    assert fingerprint(one) != fingerprint(two)
    assert checksum(np.zeros(4)) != checksum(np.zeros(5))
