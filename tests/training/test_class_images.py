"""Images of the class: drawn once, by any number of processes and after any kill with the same bits, and half of what
a run is trained on."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import context
from test_sweep import SMALL
from tiny import TinySource, build_tiny_model

import sdft
from sdft.data.datamodule import Images
from sdft.data.sources import Folder
from sdft.data.sources.beside import beside
from sdft.errors import UserError
from sdft.formats.lora_file import read_lora
from sdft.planning.steps import num_steps
from sdft.rng import seed_of
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.training.class_images import MADE_FROM, ClassImages, as_argument

PROMPT = "a photo of the dog"


def class_images(folder: Path | None, count: int = 5, steps: int = 2, batch_size: int = 2, **more) -> ClassImages:
    sampler = Sampler("euler", steps, cfg=2.0, batch_size=batch_size)
    return ClassImages(
        **{"prompt": PROMPT, "size": 32} | more, count=count, sampler=sampler, folder=folder and str(folder)
    )


def drawn(folder: Path | None = None, **options) -> tuple[Path, dict[str, bytes]]:
    """The folder, and the bytes of its images by name."""
    place = class_images(folder, **options).draw(build_tiny_model())
    return place, contents(place)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def pixels(content: Path) -> np.ndarray:
    with Image.open(content) as image:
        return np.asarray(image).astype(int)


def test_image_i_is_that_of_its_own_seed_whatever_the_batch(tmp_path: Path) -> None:
    _, files = drawn(tmp_path / "a", count=3)
    assert list(files) == ["000000.png", "000001.png", "000002.png"]
    drawn(tmp_path / "b", count=3, batch_size=3)
    for index, name in enumerate(files):
        seed = seed_of(0, "class image", PROMPT, index)
        (alone,) = generate(build_tiny_model(), [PROMPT], [seed], Sampler("euler", 2, cfg=2.0), (32, 32))
        for folder in ("a", "b"):
            assert np.abs(pixels(tmp_path / folder / name) - alone.astype(int)).max() <= 1  # sums are rounded apart
    assert len(set(files.values())) == 3


def test_the_cache_goes_by_what_an_image_depends_on() -> None:
    first, files = drawn()
    assert drawn() == (first, files)
    assert drawn(count=6)[0] == first
    others = [{"prompt": "a photo of the cat"}, {"steps": 3}, {"size": 64}]
    assert len({first, *(drawn(count=1, **changed)[0] for changed in others)}) == 4
    assert class_images(None, 1).draw(build_tiny_model(seed=1)) != first
    model = build_tiny_model()
    model.set_prediction_type("v_prediction", False)
    assert class_images(None, 1).draw(model) != first


def test_what_is_missing_or_damaged_is_drawn_again_with_the_same_bits(tmp_path: Path) -> None:
    _, files = drawn(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    (tmp_path / "000001.png").unlink()  # of a batch whose other image is there
    whole = (tmp_path / "000004.png").read_bytes()
    (tmp_path / "000004.png").write_bytes(whole[: len(whole) // 2])
    assert class_images(tmp_path).missing(tmp_path) == [1, 4]
    assert drawn(tmp_path)[1] == files
    changed = {name for name in files if (tmp_path / name).stat().st_mtime_ns != times[name]}
    assert changed == {"000001.png", "000004.png"}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, MADE_FROM])


def _draw(folder: Path) -> None:
    torch.set_num_threads(1)
    class_images(folder, count=8, steps=20).draw(build_tiny_model())


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    process = context.Process(target=_draw, args=(tmp_path / "killed",))
    process.start()
    until = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.png"))) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begun = contents(tmp_path / "killed")
    assert 3 <= len(begun) < 8
    _draw(tmp_path / "killed")
    _draw(tmp_path / "straight")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_processes_share_the_work_and_one_may_end_early(tmp_path: Path) -> None:
    ranks = [context.Process(target=_draw, args=(tmp_path / "shared",)) for _ in range(3)]
    for process in ranks:
        process.start()
    time.sleep(0.5)
    os.kill(ranks[0].pid, signal.SIGKILL)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks[1:]] == [0, 0]
    _draw(tmp_path / "straight")
    assert contents(tmp_path / "shared") == contents(tmp_path / "straight")


def test_a_folder_with_other_images_is_refused(tmp_path: Path) -> None:
    drawn(tmp_path / "dogs", count=1)
    with pytest.raises(UserError, match=r"class_images\.folder=.*drawn with another prompt; name another folder"):
        drawn(tmp_path / "dogs", count=1, prompt="a red cat")
    (tmp_path / "own").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "own" / "cat.png")
    with pytest.raises(UserError, match=r"not drawn as class images; .* data=mix"):
        drawn(tmp_path / "own")
    assert list(contents(tmp_path / "own")) == ["cat.png"]


def data_with(own: int, count: int, **options) -> Images:
    of_class = class_images(None, count, weight=0.5)
    return Images(TinySource(own), TinySource(2, "held out"), 2, 32, class_images=of_class, **options)


def test_a_pass_has_as_many_images_of_the_class_as_own_ones() -> None:
    """Three own images and six of the class: each own one is read twice."""
    data = data_with(3, 6)
    data.train_set.source._rounds[-1].draw(build_tiny_model())
    samples = [data.train_set.source[index] for index in range(len(data.train_set.source.keys))]
    assert Counter(sample.key.split("/")[0] for sample in samples) == {"own": 6, "class": 6}
    for sample in samples:
        of_class = sample.key.startswith("class/")
        assert sample.loss_weight == (0.5 if of_class else 1.0)
        assert (sample.caption == PROMPT) == of_class or not of_class
        assert sample.image_HWC.shape == ((32, 32, 3) if of_class else (32, 40, 3))
        assert sample.image_HWC.any()
    assert [sample.caption for sample in samples if sample.key.startswith("class/")] == [PROMPT] * 6
    assert list(data.validation_set.source.keys) == ["held out/0", "held out/1"]
    # A pass of 12 images is 6 steps of 2, and 2 passes over the own ones.
    assert num_steps(data, per_step=2, epochs=4, fewest=1, most=1000) == 12
    assert num_steps(data_with(6, 3), per_step=2, epochs=4, fewest=1, most=1000) == 24


def test_buckets_know_the_size_before_anything_is_drawn() -> None:
    data = data_with(3, 3, bucket_step=16)
    assert {hw: len(indices) for hw, indices in data.train_set.by_size().items()} == {(32, 32): 6}


def test_data_without_a_place_for_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"shuffle_shards=4 .*set data\.shuffle_shards=null"):
        beside(TinySource(3), class_images(None), 4)
    with pytest.raises(UserError, match="Folder has no place for other images"):
        as_argument(class_images(None), Folder)
    with pytest.raises(UserError, match="draws no images; set class_images=null"):
        class_images(None).draw(torch.nn.Linear(1, 1))


WORDS = [word for word in SMALL if not word.startswith("trainer.max_steps")]
WORDS += ["class_images=generated", "class_images.prompt=a photo of a car", "class_images.count=4", "sampler.steps=1",
          "lr_schedule=constant", "callbacks.last.every=2", "callbacks.last.keep=9"]  # fmt: skip


def layers(run_dir: Path) -> dict[str, torch.Tensor]:
    lora = read_lora(run_dir / "lora.safetensors", "lora")
    return {f"{name} {key}": t for name, layer in lora.layers.items() for key, t in layer.tensors.items()}


def test_a_run_draws_them_once_and_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    folder = f"class_images.folder={tmp_path / 'cars'}"
    straight = sdft.finetune([*WORDS, folder, "trainer.max_steps=4", f"run_dir={tmp_path / 'a'}"])
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "cars").glob("*.png"))]
    assert len(times) == 4
    sdft.finetune([*WORDS, folder, "trainer.max_steps=2", f"run_dir={tmp_path / 'b'}"])
    resumed = [*WORDS, folder, "trainer.max_steps=4", f"run_dir={tmp_path / 'b'}", "resume=auto"]
    assert sdft.finetune(resumed).receipt["outputs"] == straight.receipt["outputs"]
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cars").glob("*.png"))] == times
    without = [word for word in WORDS if not word.startswith("class_images")]
    other = sdft.finetune([*without, "trainer.max_steps=4", f"run_dir={tmp_path / 'c'}"])
    assert other.receipt["outputs"] != straight.receipt["outputs"]
    with pytest.raises(UserError, match=r"saved with other data: 4 added .*, 4 removed"):
        sdft.finetune([*resumed, f"class_images.folder={tmp_path / 'trucks'}", "class_images.prompt=a truck"])


def test_a_dry_run_draws_nothing_and_says_what_would_be(tmp_path: Path, python) -> None:
    words = ["train.py", *WORDS, "trainer.max_steps=4", f"class_images.folder={tmp_path / 'cars'}", "dry_run=true"]
    status, printed = python.run(words, Path(__file__).parents[2])
    assert status == 0, printed
    assert "would draw 4 images of the class before training, 'a photo of a car'" in printed
    assert not (tmp_path / "cars").exists()


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path: Path, python) -> None:
    """With SGD: AdamW's first steps are the signs of gradients, and those near zero are rounding."""
    folder = f"class_images.folder={tmp_path / 'cars'}"
    common = ["train.py", *WORDS, folder, "trainer.max_steps=4", "trainer.accelerator=cpu", "trainer.log_every=1"]
    common += ["optimizer=sgd", "trainer.precision=32-true"]
    for name, more in (("one", ["data.batch_size=4"]), ("two", ["data.batch_size=2", "trainer.devices=2"])):
        status, printed = python.run([*common, *more, f"run_dir={tmp_path / name}"], Path(__file__).parents[2])
        assert status == 0, printed[-3000:]
    one, two = layers(tmp_path / "one"), layers(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
