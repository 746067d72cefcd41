"""The files of a choice: the recommended weights are those of the step, at the strength."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from sdft.batch import Conditioning
from sdft.choosing.run import candidates_of, remove_recommended, write_recommended
from sdft.errors import UserError
from sdft.evaluation.run import RunParts
from sdft.evaluation.stopping import Measurement
from sdft.formats.adapter import applied_lora, read_words
from sdft.formats.lora_file import read_lora
from sdft.formats.training_checkpoint import VERSION
from sdft.tuning.adapter import Adapter, Part
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters
from sdft.tuning.words import Words

PARTS: list[Part] = ["unet", "text_encoder", "text_encoder_2"]
CONFIG = OmegaConf.create({"name": "run", "size": 64})


def checkpoint(folder: Path, model, step: int, added: float) -> Path:
    """A checkpoint whose trained parameters are those of the model, and more."""
    state = {f"model.{name}": p.detach() + added for name, p in trainable_parameters(model)}
    file = folder / "checkpoints" / f"step_{step:06d}.ckpt"
    file.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "callbacks": {}, "global_step": step, "loops": {}, VERSION: "2.6"}, file)
    return file


def predicted(model) -> torch.Tensor:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context, pooled = model.encode_prompts(["a red cat"])
        return model.denoise(z, torch.tensor([500]), Conditioning(context, pooled, torch.ones(1, 6)))


def test_the_strength_is_in_the_file(tiny_model, tmp_path: Path) -> None:
    model, tuning = tiny_model(), Adapter(rank=2, alpha=4.0)
    tuning.attach(model)
    found = {step: checkpoint(tmp_path, model, step, 0.05 * step) for step in (1, 2)}
    objective = SimpleNamespace(prediction="epsilon", zero_terminal_snr=False)
    parts = RunParts(model, tuning, objective)  # type: ignore[arg-type]
    (path,) = write_recommended(tmp_path, CONFIG, parts, found, Measurement.of(2, {}, 0.5))
    assert path == tmp_path / "recommended.safetensors"
    with tuning.at_strength(model, 0.5):
        expected = predicted(model)
    assert not torch.allclose(expected, predicted(model), rtol=1e-3)
    base = tiny_model()
    before = predicted(base)
    with applied_lora(base, read_lora(path, "lora"), "lora"):
        change = predicted(base) - before
    assert (change - (expected - before)).norm() < 0.01 * change.norm()
    assert read_lora(path, "lora").metadata["modelspec.title"] == "run, step 2 at 0.5"


@pytest.mark.parametrize("alone", [False, True], ids=["beside a LoRA", "alone"])
def test_words_of_the_step_are_written(alone: bool, tiny_model, tmp_path: Path) -> None:
    """Not those of the end of the run."""
    model, words = tiny_model(), {"zorbix": "a red cat"}
    tuning = Words(words) if alone else Adapter(rank=2, parts=PARTS, new_words=words)
    tuning.attach(model)
    first = {name: rows.detach().clone() for name, rows in model.word_rows.items()}
    found = {step: checkpoint(tmp_path, model, step, 0.1 * step) for step in (1, 2)}
    objective = SimpleNamespace(prediction="epsilon", zero_terminal_snr=False)
    parts = RunParts(model, tuning, objective)  # type: ignore[arg-type]
    written = write_recommended(tmp_path, CONFIG, parts, found, Measurement.of(1, {}))
    files = ["recommended_words.safetensors", "recommended_embeddings"]
    assert [path.name for path in written] == (files if alone else ["recommended.safetensors", *files])
    assert [path.name for path in (tmp_path / "recommended_embeddings").iterdir()] == ["zorbix.safetensors"]
    for path in (tmp_path / "recommended_words.safetensors", tmp_path / "recommended_embeddings/zorbix.safetensors"):
        rows = read_words(path).rows
        assert rows.keys() == first.keys()
        for name in rows:
            torch.testing.assert_close(rows[name], first[name] + 0.1)


def test_a_whole_model_becomes_a_folder(tiny_model, tmp_path: Path) -> None:
    model, tuning = tiny_model(), Full(["unet"])
    tuning.attach(model)
    (tmp_path / "model").mkdir()
    objective = SimpleNamespace(prediction="epsilon", zero_terminal_snr=False)
    parts = RunParts(model, tuning, objective)  # type: ignore[arg-type]
    found = {1: checkpoint(tmp_path, model, 1, 0.0)}
    (path,) = write_recommended(tmp_path, CONFIG, parts, found, Measurement.of(1, {}))
    assert (path / "model_index.json").is_file()


def test_checkpoints_are_chosen_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SimpleNamespace(checkpoints={step: tmp_path / str(step) for step in range(10, 100, 10)}, num_steps=100)
    monkeypatch.setattr("sdft.choosing.run.read_subjects", lambda sources: [subject])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert list(candidates_of(tmp_path, None, 5)) == [30, 50, 60, 80, 100]
    assert list(candidates_of(tmp_path, None, 50)) == list(range(10, 101, 10))
    assert list(candidates_of(tmp_path, [100, 20], 5)) == [20, 100]
    with pytest.raises(UserError, match=r"no checkpoint of step 25; there are \[10, 20"):
        candidates_of(tmp_path, [25], 5)
    subject.checkpoints, subject.num_steps = {}, None
    with pytest.raises(UserError, match="kept no checkpoints; train with callbacks=stop_early"):
        candidates_of(tmp_path, None, 5)


def test_what_an_earlier_choice_wrote_is_removed_where_nothing_is_recommended(tmp_path: Path) -> None:
    """Not what others wrote: without choice.json, no choice was made here."""
    files = [tmp_path / "recommended.safetensors", tmp_path / "recommended_words.safetensors"]
    folders = [tmp_path / "recommended", tmp_path / "recommended_embeddings"]
    for file in files:
        file.write_bytes(b"weights")
    for folder in folders:
        folder.mkdir()
        (folder / "a").write_bytes(b"weights")
    remove_recommended(tmp_path)
    assert all(path.exists() for path in (*files, *folders))
    (tmp_path / "choice.json").write_text("{}")
    (tmp_path / "lora.safetensors").write_bytes(b"weights")
    remove_recommended(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"choice.json", "lora.safetensors"}
