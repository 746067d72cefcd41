"""Previews: settings of single prompts, the files, and that a run with them trains the same bits as one without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import slow, trained_module
from PIL import Image
from small_runs import Run, result, train
from test_sweep import SMALL
from tiny import SIZE, build_tiny_model

import sdft.training.__main__ as train_command
from sdft.config.command import ConfigError, check, compose
from sdft.errors import UserError
from sdft.evaluation.image_grid import BAR, letterboxed
from sdft.formats.adapter import lora_from_model, write_lora
from sdft.formats.lora_file import read_lora, write_lora_file
from sdft.formats.lora_stack import stack_loras
from sdft.planning.dry_run import run_setup
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.training.callbacks.preview_prompts import read_prompts
from sdft.training.callbacks.previews import Previews
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.words import Words

KEY = r"callbacks\.previews\.prompts\[1\]"
QUICK = Sampler(steps=1, cfg=2.0, batch_size=4)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "a cat"}, rf"{KEY}\.prompts: is no setting of a prompt; did you mean 'prompt'\?"),
    ({"seed": 3}, rf"{KEY}: has no prompt"),
    ({"prompt": 3}, rf"{KEY}\.prompt=3: must be a text"),
    ({"prompt": "a cat", "seed": -1}, rf"{KEY}\.seed=-1: must be a whole number, 0 or more"),
    ({"prompt": "a cat", "seed": True}, rf"{KEY}\.seed=True: must be"),
    ({"prompt": "a cat", "size": [32]}, rf"{KEY}\.size=\[32\]: must be a side in pixels, or \[height, width\]"),
    ({"prompt": "a cat", "size": 0}, rf"{KEY}\.size=0: must be"),
    ({"prompt": "a cat", "steps": 1.5}, rf"{KEY}\.steps=1\.5: must be a number of steps"),
    ({"prompt": "a cat", "cfg": "high"}, rf"{KEY}\.cfg=high: must be a number"),
    ({"prompt": "a cat", "strength": -0.5}, rf"{KEY}\.strength=-0\.5: must be a number, 0 or more"),
    ({"prompt": "a cat", "strength": float("nan")}, rf"{KEY}\.strength=nan: must be"),
    ({"prompt": "a cat", "sampler": "dimm"}, rf"{KEY}\.sampler\.name=dimm: is no sampler.*did you mean"),
    ({"prompt": "a cat", "sampler": {"step": 3}}, rf"{KEY}\.sampler\.step: is no setting of a sampler; did you mean"),
    ({"prompt": "a cat", "sampler": {"steps": 0}}, rf"{KEY}\.sampler\.steps=0: must be"),
    ({"prompt": "a cat", "sampler": {"steps": 3}, "steps": 4}, r"sampler\.steps=3: .*\.steps is 4; remove one"),
    ({"prompt": "a cat", "loras": {"nowhere.safetensors": 1}}, rf"{KEY}\.loras: there is no file nowhere"),
    ({"prompt": "a cat", "loras": ["a.safetensors"]}, rf"{KEY}\.loras=.*: must be paths of LoRAs and their strengths"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_a_wrong_prompt_is_refused_by_its_key(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(["a dog", entry], QUICK, (32, 32))


def test_settings_of_a_prompt_are_those_of_the_run_but_for_its_own() -> None:
    run = Sampler("euler", steps=9, cfg=4.0, negative="grey", batch_size=3)
    named = {"prompt": "a dog", "sampler": "ddim", "negative": "", "size": [32, 48], "seed": 9}
    other = Sampler("heun", steps=7)
    plain, mine, theirs = read_prompts(
        ["a cat", named, {"prompt": "a fox", "sampler": other, "steps": 5}], run, (32, 32)
    )
    assert (plain.seed, plain.size_hw, plain.sampler.settings) == (0, (32, 32), run.settings)
    assert (mine.seed, mine.size_hw) == (9, (32, 48))
    assert mine.sampler.settings == {**run.settings, "name": "ddim", "negative": ""}
    assert theirs.sampler.settings == {**other.settings, "steps": 5}
    assert plain.label == "a cat"
    assert mine.label == "ddim, seed 9: a dog"


def test_options_of_the_command_line_reach_the_prompts(tmp_path: Path) -> None:
    mapping = "{prompt: a dog, seed: 4, size: [64, 96], sampler: {name: ddim, steps: 3}, loras: {/a/b.safetensors: 1}}"
    cfg = compose("train", [f"callbacks.previews.prompts=[a cat, {mapping}]", "callbacks.previews.every=7"])
    check(cfg)
    assert cfg.callbacks.previews.prompts[1].loras == {"/a/b.safetensors": 1}
    with pytest.raises(ConfigError, match=r"callbacks\.previews\.prompts"):
        check(compose("train", ["callbacks.previews.prompts=[3]"]))
    cfg = compose("train", ["callbacks.previews.prompts=[{prompt: a dog, size: [128, 192]}]"])
    assert run_setup(cfg).drawn_side == 157  # the root of the area


def test_only_adapters_have_a_strength(tmp_path: Path) -> None:
    half = Previews(str(tmp_path), ["a cat", {"prompt": "a cat", "strength": 0.5}], QUICK, 32)
    half.check_tuning(Adapter(rank=2))
    with pytest.raises(UserError, match=rf"{KEY}\.strength=0\.5: only an adapter has a strength"):
        half.check_tuning(Full())
    with pytest.raises(UserError, match=rf"{KEY}\.strength=0\.5: only an adapter"):
        half.check_tuning(Words({"<sks>": "cat"}))
    with pytest.raises(UserError, match=rf"{KEY}\.strength=0\.5: the strength of a DoRA must be 0 or 1"):
        half.check_tuning(Adapter(rank=2, method="dora"))
    Previews(str(tmp_path), [{"prompt": "a cat", "strength": 0}], QUICK, 32).check_tuning(Full())


def other_lora(folder: Path, seed: int = 3, **options: Any) -> Path:
    """A LoRA of the tiny model that changes what it draws."""
    model, path = build_tiny_model(), folder / f"other_{seed}.safetensors"
    Adapter(rank=2, **options).attach(model)
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=noise)
    write_lora(model, path, torch.float32)
    return path


def state_of(model: Any) -> dict[str, Any]:
    """All that a picture could leave behind."""
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        "tensors": tensors,
        "objects": [id(p) for p in model.parameters()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "scaling": [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling")],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "peft": id(getattr(model.unet, "peft_config", None)),
    }


TUNINGS = {
    "lora": lambda: Adapter(rank=2, alpha=3.0, rslora=True, train_norms=True),
    "pissa": lambda: Adapter(rank=2, init="pissa"),
    "te": lambda: Adapter(rank=2, parts=("unet", "text_encoder", "text_encoder_2"), new_words={"<sks>": "red cat"}),
    "words": lambda: Words({"<sks>": "red cat"}),
    "full": Full,
}


@pytest.mark.parametrize("name", ["lora", "full", slow("words"), slow("te"), slow("pissa")])
def test_a_picture_with_loras_leaves_no_bit_behind(name: str, tmp_path: Path) -> None:
    path = other_lora(tmp_path)
    module = trained_module(build_tiny_model(), TUNINGS[name]())
    strength = 0.5 if name in ("lora", "pissa", "te") else 1.0
    entries = ["a red cat", {"prompt": "a red cat", "loras": {str(path): 0.7}, "strength": strength}]
    plain, stacked = read_prompts(entries, QUICK, (SIZE, SIZE))
    before = state_of(module.model)

    def drawn(trained: bool) -> np.ndarray:
        with stacked.applied(module.model, module.tuning, trained):
            return generate(module.model, ["a red cat"], [1], QUICK, (SIZE, SIZE))

    stacked.check(module, num_shards=1)
    with plain.applied(module.model, module.tuning, trained=True):
        alone = generate(module.model, ["a red cat"], [1], QUICK, (SIZE, SIZE))
    with_tuning, without = drawn(True), drawn(False)
    assert not np.array_equal(with_tuning, alone)
    assert not np.array_equal(with_tuning, without) or name == "words"  # that the prompt does not have
    after = state_of(module.model)
    assert all(torch.equal(before["tensors"][key], after["tensors"][key]) for key in before["tensors"])
    assert {**before, "tensors": 0} == {**after, "tensors": 0}


def test_a_stack_is_that_of_the_exported_file(tmp_path: Path) -> None:
    """The same weights as python eval.py applies: the trained LoRA and the other one, each at its strength."""
    path, module = other_lora(tmp_path), trained_module(build_tiny_model(), TUNINGS["lora"]())
    entry = {"prompt": "a cat", "loras": {str(path): 0.7}, "strength": 0.25}
    (prompt,) = read_prompts([entry], QUICK, (SIZE, SIZE))
    with prompt.applied(module.model, module.tuning, trained=True):
        found = lora_from_model(module.model)
    exported = tmp_path / "mine.safetensors"
    write_lora_file(lora_from_model(module.model, module.tuning.initial), exported, "kohya", torch.float32)
    expected = stack_loras([(read_lora(exported, "a"), 0.25), (read_lora(path, "b"), 0.7)], "")
    assert found.layers.keys() == expected.layers.keys()
    for layer, mine in found.layers.items():
        theirs = expected.layers[layer]
        for tensor, value in mine.tensors.items():
            torch.testing.assert_close(value * (mine.scale if "up" in tensor else 1), theirs.tensors[tensor] * (
                theirs.scale if "up" in tensor else 1
            ))  # fmt: skip


def test_strength_is_between_the_base_and_the_trained_model(tmp_path: Path) -> None:
    module = trained_module(build_tiny_model(), TUNINGS["lora"]())
    entries = [{"prompt": "a cat", "strength": strength} for strength in (0, 0.5, 1)]
    weights = []
    norm = module.model.unet.conv_norm_out
    for prompt in read_prompts(entries, QUICK, (SIZE, SIZE)):
        with prompt.applied(module.model, module.tuning, trained=True):
            weights.append(norm.weight.detach().clone())
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert torch.equal(weights[0], torch.ones_like(weights[0]))


def test_a_lora_of_another_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    path = other_lora(tmp_path)
    lora = read_lora(path, "")
    layers = {f"{name}_of_another": layer for name, layer in lora.layers.items()}
    module = trained_module(build_tiny_model(), Adapter(rank=2))
    metadata = {"modelspec.prediction_type": "v"}
    write_lora_file(lora, tmp_path / "v.safetensors", "kohya", torch.float32, metadata)
    (prompt,) = read_prompts([{"prompt": "a", "loras": {str(tmp_path / "v.safetensors"): 1}}], QUICK, (32, 32))
    with pytest.raises(UserError, match=r"prompts\[0\]\.loras: .*v\.safetensors was trained for v"):
        prompt.check(module, 1)
    (prompt,) = read_prompts([{"prompt": "a", "loras": {str(path): 1}}], QUICK, (32, 32))
    with pytest.raises(UserError, match=r"prompts\[0\]\.loras: need whole weights, which strategy=fsdp shards"):
        prompt.check(module, 2)
    object.__setattr__(prompt.loras[0].lora, "layers", layers)
    with pytest.raises(UserError, match=r"prompts\[0\]\.loras: the LoRA does not fit the base model"):
        prompt.check(module, 1)
    (prompt,) = read_prompts([{"prompt": "a", "size": [32, 33]}], QUICK, (32, 32))
    with pytest.raises(UserError, match=r"prompts\[0\]: size \(32, 33\): both sides must be multiples"):
        prompt.check(module, 1)


def previews(folder: Path, path: Path, prompt: str = "the dog", every: int = 2) -> Previews:
    entries = [
        "a red cat",
        {"prompt": prompt, "seed": 7, "size": [32, 48], "negative": "neon", "steps": 2},
        {"prompt": "a red cat", "strength": 0.5, "loras": {str(path): 0.7}, "sampler": "ddim"},
    ]
    return Previews(str(folder), entries, QUICK, SIZE, every)


def image(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_a_run_leaves_its_pictures_and_trains_the_same_bits(tmp_path: Path) -> None:
    path = other_lora(tmp_path)
    options = {"tuning_options": {"train_norms": True, "rslora": True}, "max_steps": 5, "dropout": 0.2}
    plain = train(Run(tmp_path / "plain", **options))
    run = Run(tmp_path / "run", callbacks=[previews(tmp_path / "run", path)], **options)
    drawn = train(run)
    assert plain["losses"] == drawn["losses"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, drawn["weights"][name]), name
    folder = run.folder / "previews"
    entries = json.loads((folder / "prompts.json").read_text())
    assert [(entry["file"], entry["prompt"], entry["negative"], entry["seed"], entry["size"]) for entry in entries] == [
        ("00.png", "a red cat", "", 0, [32, 32]),
        ("01.png", "the dog", "neon", 7, [32, 48]),
        ("02.png", "a red cat", "", 2, [32, 32]),
    ]
    assert entries[1]["sampler"]["steps"] == 2
    assert entries[2]["strength"] == 0.5
    assert entries[2]["loras"][0]["lora"] == str(path)
    for step in ("base", "step_000002", "step_000004"):
        assert [list(image(folder / step / entry["file"]).shape[:2]) for entry in entries] == [
            entry["size"] for entry in entries
        ]
    assert not np.array_equal(image(folder / "base/00.png"), image(folder / "step_000004/00.png"))
    assert (folder / "step_000004.png").is_file()
    assert sorted(file.name for file in folder.iterdir() if file.is_dir()) == ["base", "step_000002", "step_000004"]


@pytest.mark.slow
def test_a_resumed_run_draws_no_base_picture_again_that_is_there(tmp_path: Path) -> None:
    path, folder = other_lora(tmp_path), tmp_path / "run"
    base = folder / "previews" / "base"
    train(Run(folder, max_steps=3, callbacks=[previews(folder, path)]))
    marks = [np.full_like(image(base / f"0{number}.png"), 77) for number in range(3)]
    for number in (0, 1):  # as only the first run could have drawn them
        Image.fromarray(marks[number]).save(base / f"0{number}.png")
    (base / "02.png").write_bytes(b"half written")
    train(
        Run(folder, max_steps=5, callbacks=[previews(folder, path, "a dog")], resume=folder / "checkpoints/last.ckpt")
    )
    assert np.array_equal(image(base / "00.png"), marks[0])
    assert not np.array_equal(image(base / "01.png"), marks[1])  # another prompt now
    assert image(base / "02.png").shape == (32, 32, 3)
    assert json.loads((folder / "previews/prompts.json").read_text())[1]["prompt"] == "a dog"
    other = tmp_path / "other"  # which goes on from this run in a folder of its own
    train(Run(other, max_steps=5, callbacks=[previews(other, path)], resume=folder / "checkpoints/last.ckpt"))
    assert not (other / "previews").exists()  # no preview is due before the end
    assert image(base / "00.png")[0, 0, 0] == 77


@pytest.mark.slow
def test_sharded_weights_are_drawn_by_all_ranks(tmp_path: Path) -> None:
    entries = ["a red cat", {"prompt": "the dog", "strength": 0.5, "size": [32, 48]}]
    run = Run(
        tmp_path / "run",
        strategy="fsdp",
        max_steps=3,
        callbacks=[Previews(str(tmp_path / "run"), entries, QUICK, SIZE, 2)],
    )
    result(run, world_size=2)
    folder = run.folder / "previews"
    assert image(folder / "base/01.png").shape == image(folder / "step_000002/01.png").shape == (32, 48, 3)


def test_images_of_several_sizes_share_a_grid() -> None:
    small, wide = np.full((4, 6, 3), 10, np.uint8), np.full((8, 20, 3), 20, np.uint8)
    placed = letterboxed([small, wide], (8, 20))
    assert placed.shape == (2, 8, 20, 3)
    assert (placed[0, :, 4:16] == 10).all()  # twice as large, in the middle
    assert (placed[0, :, :4] == BAR).all()
    assert (placed[0, :, 16:] == BAR).all()
    assert (placed[1] == 20).all()


def test_null_switches_a_callback_and_a_logger_off(tmp_path: Path, monkeypatch) -> None:
    words = [*SMALL, "callbacks=default", "callbacks.previews=null", "logger=csv_wandb", "logger.wandb=null"]
    for more in (["dry_run=true"], []):
        monkeypatch.setattr(sys, "argv", ["train.py", *words, f"run_dir={tmp_path / 'run'}", *more])
        train_command.main()
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert not (tmp_path / "run" / "previews").exists()
    assert not (tmp_path / "run" / "wandb").exists()
