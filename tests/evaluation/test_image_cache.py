"""Pictures on disk: made once, the same alone and in the grid, after a stop and on several ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import full_disk
from safetensors.torch import load_file, save_file

from sdft.batch import Conditioning
from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.evaluation.grid import Axes, GridCell, build_grid
from sdft.evaluation.image_cache import ImageCache, write_image
from sdft.evaluation.subject_loader import SubjectLoader, model_digest
from sdft.evaluation.subjects import FINAL, Subject, read_subjects
from sdft.formats.power_average import write_averages
from sdft.formats.training_checkpoint import VERSION
from sdft.models.nano import WEIGHTS as NANO
from sdft.models.sdxl import SDXL
from sdft.sampling.samplers import Sampler
from sdft.tuning.adapter import Adapter
from sdft.tuning.parameters import trainable_parameters

PROMPTS = ["a red cat", "кот 🐈", "neon lines"]
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
BATCH = 4


@pytest.fixture
def models(tiny_model) -> SubjectLoader:
    models = SubjectLoader(lambda weights="nano": tiny_model(), "nano", torch.device("cpu"))
    models._base = tiny_model()
    return models


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    tensors = {f"{LAYER}.lora_{x}.weight": torch.randn(shape, generator=random) for x, shape in
               (("A", (2, 24)), ("B", (24, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture
def wanted(lora: Path) -> list[GridCell]:
    subjects = read_subjects({"base": "nano", "mine": str(lora)})
    return build_grid(subjects, PROMPTS, [0, 1], Sampler("euler_a", 2, 3.0), 32, Axes(cfg=[1, 3]))


def gallery(folder: Path, models: SubjectLoader) -> ImageCache:
    return ImageCache(folder, models, "fp32", BATCH)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def test_a_cell_is_the_same_alone_and_in_the_grid(models, wanted, tmp_path: Path) -> None:
    """Within one step of a byte: a matrix product of another batch size may add in another order."""
    whole, alone = gallery(tmp_path / "whole", models), gallery(tmp_path / "alone", models)
    whole.fill(wanted)
    assert len(contents(tmp_path / "whole")) == len(wanted) == 24
    for cell in (wanted[3], wanted[-1]):
        alone.fill([cell])
        assert alone.path(cell).name == whole.path(cell).name
        assert np.abs(pixels(alone.path(cell)) - pixels(whole.path(cell))).max() <= 1
    assert np.abs(pixels(whole.path(wanted[3])) - pixels(whole.path(wanted[15]))).max() > 3


def test_cached_images_are_not_generated_again(models: SubjectLoader, wanted: list[GridCell], tmp_path: Path) -> None:
    drawn = gallery(tmp_path / "pictures", models)
    drawn.fill(wanted[:6])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    drawn.fill(wanted)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    drawn.loader.open = None  # type: ignore[method-assign, assignment]
    drawn.fill(wanted)


def test_after_a_full_disk_the_same_pictures_come(models, wanted, tmp_path: Path, capsys) -> None:
    """`capsys` holds what the bar writes in memory: pytest's own file would be too large as well."""
    gallery(tmp_path / "whole", models).fill(wanted)
    stopped = gallery(tmp_path / "stopped", models)
    stopped.fill(wanted[:BATCH])
    message = r"cannot be written to \(File too large\); the images written so far are kept"
    with pytest.raises(UserError, match=message), full_disk(200):
        stopped.fill(wanted)
    kept = contents(tmp_path / "stopped")
    assert len(kept) == BATCH
    stopped.fill(wanted)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_ranks_share_the_work_and_draw_the_same(models: SubjectLoader, wanted: list[GridCell], tmp_path: Path) -> None:
    gallery(tmp_path / "one", models).fill(wanted)
    two = gallery(tmp_path / "two", models)
    two.fill(wanted, ProcessInfo(1, 2))
    half = contents(tmp_path / "two")
    assert len(wanted) * 0.3 < len(half) < len(wanted) * 0.7
    two.fill(wanted, ProcessInfo(0, 2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, ProcessInfo(5, 8, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, ProcessInfo(1, 2, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1"}, ProcessInfo(2, 3, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, ProcessInfo()),
        ({}, ProcessInfo()),
    ],
)
def test_ranks_are_those_of_the_launcher(variables: dict[str, str], expected: ProcessInfo, monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ProcessInfo.current() == expected


def test_a_picture_is_named_by_what_it_was_made_from(models: SubjectLoader, wanted: list[GridCell], lora: Path) -> None:
    drawn, cell = gallery(Path("x"), models), wanted[-1]
    name = drawn.path(cell)
    changed = [
        replace(cell, settings=replace(cell.settings, seed=7)),
        replace(cell, settings=replace(cell.settings, negative="x")),
        replace(cell, settings=replace(cell.settings, size_hw=(32, 48))),
        replace(cell, scale=0.5),
        replace(cell, subject=wanted[0].subject),
    ]
    assert len({name, *map(drawn.path, changed)}) == 6
    assert drawn.path(replace(cell, variant="another name", axes={})) == name
    assert drawn.path(replace(cell, scale=0.0)) == drawn.path(replace(cell, subject=wanted[0].subject))
    base = replace(cell, subject=wanted[0].subject)
    assert drawn.path(replace(base, scale=0.3)) == drawn.path(base)
    assert ImageCache(Path("x"), models, "bf16", BATCH).path(cell) != name


@torch.no_grad()
def prediction(model: SDXL) -> torch.Tensor:
    """What a model predicts of some noise."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context, pooled = model.encode_prompts(["a red cat"])
    return model.denoise(x, torch.tensor([500]), Conditioning(context, pooled, torch.ones(1, 6)))


def attached(build: Callable[[], SDXL], method: Any = "lora") -> tuple[SDXL, Adapter]:
    """A model with a LoRA, and what attached it."""
    model, tuning = build(), Adapter(rank=2, method=method)
    tuning.attach(model)
    return model, tuning


def test_loras_have_strengths_and_stack(models: SubjectLoader, lora: Path) -> None:
    """Twice at a half is once; at strength 0 it is the base, at -1 it takes away what 1 gives."""
    sources = {
        "once": str(lora),
        "halves": [{"lora": str(lora), "scale": 0.5}, {"lora": str(lora), "scale": 0.5}],
        "off": {"lora": str(lora), "scale": 0.0},
        "none": [{"lora": str(lora), "scale": 1.0}, {"lora": str(lora), "scale": -1.0}],
    }
    found = {s.name: s for s in read_subjects(sources)}

    def predicted(subject: Subject, scale: float = 1.0) -> torch.Tensor:
        with models.open(subject, scale) as model:
            return prediction(model)

    base, once = predicted(Subject("base", "nano", "nano")), predicted(found["once"])
    assert (once - base).abs().max() > 1e-3
    torch.testing.assert_close(predicted(found["halves"]), once, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(predicted(found["none"]), base, rtol=1e-4, atol=1e-6)
    assert torch.equal(predicted(found["off"]), base)
    assert torch.equal(predicted(found["once"], 0.0), base)
    assert not torch.equal(predicted(found["once"], 0.5), once)
    assert found["halves"].kind == "2 LoRAs"


def test_a_lora_that_learned_v_is_sampled_so_and_leaves_the_schedule(models: SubjectLoader, lora: Path) -> None:
    tensors = load_file(lora)
    for zero_snr in ("True", "False"):
        save_file(tensors, lora, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": zero_snr})
        with models.open(*read_subjects({"mine": str(lora)})) as model:
            assert model.scheduler.config.prediction_type == "v_prediction"
            assert model.scheduler.config.rescale_betas_zero_snr == (zero_snr == "True")
        assert models.base.scheduler.config.prediction_type == "epsilon"


def test_checkpoints_of_a_run_are_opened_on_one_model(tiny_model, tmp_path: Path) -> None:
    """The average where the run kept one; the final step is the run's result, drawn from its file."""
    opened = []

    def rebuild(run: Path) -> tuple[SDXL, Adapter]:
        opened.append(run)
        return attached(tiny_model)

    (tmp_path / "checkpoints").mkdir()
    trained = {name: p.detach() for name, p in trainable_parameters(rebuild(tmp_path)[0])}
    for step, callbacks in ((50, {"EMA": {"average": {k: v + 1 for k, v in trained.items()}}}), (100, {})):
        state = {f"model.{name}": value + 2 for name, value in trained.items()}
        file = tmp_path / "checkpoints" / f"step_{step:06d}.ckpt"
        whole = {"callbacks": callbacks, "global_step": step, "loops": {}, VERSION: "2.6"}
        torch.save({"state_dict": state, **whole}, file)
    run = Subject("run", str(tmp_path), run=tmp_path, num_steps=150)
    models = SubjectLoader(lambda weights="nano": tiny_model(), "nano", torch.device("cpu"), rebuild)
    assert run.steps == (50, 100, 150)
    for step, added in ((50, 1), (100, 2)):
        with models.open(run, step=step) as model:
            for name, p in trainable_parameters(model):
                assert torch.equal(p, trained[name] + added)
    assert len(opened) == 2, "one for this test, one for all checkpoints"
    assert models.identity(run, 1.0, 50) != models.identity(run, 1.0, 100)
    torch.save({**whole, "state_dict": {}, "callbacks": {}}, tmp_path / "checkpoints" / "step_000120.ckpt")
    message = r"subjects\.run=.*step_000120\.ckpt holds other parameters"
    with pytest.raises(UserError, match=message), models.open(run, step=120):
        pass


def test_a_checkpoint_has_a_strength(tiny_model, tmp_path: Path) -> None:
    """Half of a LoRA's strength is half of its B; a DoRA has none between 0 and 1."""
    (tmp_path / "checkpoints").mkdir()
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(p.shape, generator=generator) for name, p in trainable_parameters(attached(tiny_model)[0])
    }
    for step, share in ((50, 1.0), (100, 0.5)):
        state = {f"model.{name}": value * (share if "lora_B" in name else 1) for name, value in drawn.items()}
        whole = {"callbacks": {}, "global_step": step, "loops": {}, VERSION: "2.6"}
        torch.save({"state_dict": state, **whole}, tmp_path / "checkpoints" / f"step_{step:06d}.ckpt")
    run = Subject("run", str(tmp_path), run=tmp_path, num_steps=150)
    models = SubjectLoader(
        lambda weights="nano": tiny_model(), "nano", torch.device("cpu"), lambda run: attached(tiny_model)
    )

    def predicted(scale: float, step: int) -> torch.Tensor:
        with models.open(run, scale, step) as model:
            return prediction(model)

    torch.testing.assert_close(predicted(0.5, 50), predicted(1.0, 100))
    assert (predicted(0.5, 50) - predicted(1.0, 50)).abs().max() > 1e-3
    assert torch.equal(predicted(0.0, 50), prediction(tiny_model()))
    assert models.identity(run, 0.5, 50) != models.identity(run, 1.0, 50)
    doras = SubjectLoader(
        lambda weights="nano": tiny_model(), "nano", torch.device("cpu"), lambda run: attached(tiny_model, "dora")
    )
    trained = {f"model.{name}": p.detach() for name, p in trainable_parameters(attached(tiny_model, "dora")[0])}
    torch.save({"state_dict": trained, **whole}, tmp_path / "checkpoints" / "step_000050.ckpt")
    message = "axes.scale: the strength of a DoRA must be 0 or 1"
    with pytest.raises(UserError, match=message), doras.open(run, 0.5, 50):
        pass


def test_averages_of_a_run_are_opened_at_any_width(tiny_model, tmp_path: Path) -> None:
    trained = {name: p.detach() for name, p in trainable_parameters(attached(tiny_model)[0])}
    for step in (50, 100):
        copies = {width: {name: p + step for name, p in trained.items()} for width in (0.05, 0.1)}
        write_averages(tmp_path / "averages" / f"step_{step:06d}.safetensors", copies)
    run, other = Subject("run", str(tmp_path), run=tmp_path, num_steps=100), Subject("base", "nano", "nano")
    models = SubjectLoader(
        lambda weights="nano": tiny_model(), "nano", torch.device("cpu"), lambda run: attached(tiny_model)
    )
    with models.open(run, width=0.1) as model:
        for name, p in trainable_parameters(model):
            torch.testing.assert_close(p, trained[name] + 100)
    assert models.identity(run, 1.0, FINAL, 0.1) != models.identity(run, 1.0, FINAL, 0.2)
    cells = build_grid([other, run], ["a"], [0], Sampler(), 64, Axes(width=[0.05, 0.1]), ["width"])
    assert [(cell.variant, cell.width) for cell in cells] == [
        ("base", None), ("run width 0.05", 0.05), ("run width 0.1", 0.1)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"axes\.width: none of the subjects is a run with averages"):
        build_grid([other], ["a"], [0], Sampler(), 64, Axes(width=[0.05]))


def test_wrong_parts_of_a_subject_are_named(lora: Path) -> None:
    for source, message in [
        ([], "is an empty list"),
        ({"lora": str(lora), "strength": 1}, "strength: a part is"),
        ({"scale": 1}, "needs the path of a LoRA"),
        ({"lora": "nano", "scale": 1}, "is model, not a LoRA"),
        (["nano", "nano"], "has 2 models; blend them"),
    ]:
        with pytest.raises(UserError, match=rf"^subjects\.mine.*{message}"):
            read_subjects({"mine": source})


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="cannot be written to"), full_disk(500):
        write_image(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_beside_a_model_is_part_of_its_digest(tmp_path: Path) -> None:
    plain, other = (shutil.copytree(NANO, tmp_path / name) for name in ("plain", "other"))
    (other / "tokenizer" / "notes.txt").touch()
    assert model_digest(str(plain)) == model_digest(str(NANO)) != model_digest(str(other))
