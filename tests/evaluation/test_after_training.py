"""Metrics that a run cannot measure, in `summary.json`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.data.sources import ToyWorld
from sdft.evaluation.after_training import AutoencoderEvaluation, StyleEvaluation
from sdft.protocols import PartialVerdict
from sdft.sampling.samplers import Sampler
from sdft.training.run import summary_lines, unmeasured


@pytest.mark.parametrize("num", [3, 4])
def test_what_cannot_be_measured_is_null_with_a_reason(num: int, tiny_model, tiny_source, tmp_path: Path) -> None:
    """Without a judge there is no adherence; with three held-out images there is no style gain, with four there is."""
    sampler = Sampler("euler", steps=1, cfg=1.0)
    verdict = StyleEvaluation(tiny_source(num), ["a cat"], sampler, size=32, reduced_side=32)
    expected = {"adherence", "style_gain"} if num == 3 else {"adherence"}
    assert isinstance(verdict, PartialVerdict)
    assert set(unmeasured(verdict)) == expected
    assert unmeasured(None) == {}

    found = verdict(tiny_model(), nullcontext, tmp_path)
    assert {name for name, value in found.items() if value is None} == expected
    assert found["adherence_note"] == "not measured: verdict.judge is null; name a CLIP with verdict.judge="
    assert isinstance(found["style_gain"], float) == (num == 4)
    if num == 3:
        assert "3 held-out images, needs 4; hold out more with data.held_out=" in found["style_gain_note"]
    lines = list(summary_lines({"name": "x", "train_seconds": 1.0, "artifacts": {}, **found}, tmp_path))
    assert [line.split()[0] for line in lines if "not measured" in line] == sorted(expected, reverse=True)


def test_the_next_step_names_a_file_that_was_written(tmp_path: Path) -> None:
    """LoHa and LoKr have no file for diffusers."""

    def last(**artifacts: str) -> str:
        return list(summary_lines({"name": "x", "train_seconds": 1.0, "artifacts": artifacts}, tmp_path))[-1]

    assert "load_lora_weights('a.safetensors')" in last(lora="a.safetensors", lora_kohya="b.safetensors")
    assert "use b.safetensors in ComfyUI; diffusers cannot load this method" in last(lora_kohya="b.safetensors")
    assert "model.weights=model" in last(model="model")


class _Changed(torch.nn.Module):
    """A VAE that keeps images but for one change."""

    device = torch.device("cpu")

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.change = change

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x))

    def decode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.change(x))


def test_the_error_of_patches_sees_blur_where_psnr_sees_brightness(tmp_path: Path) -> None:
    evaluation = AutoencoderEvaluation({"photo": ToyWorld(["photo"], 4, "test", size=64)}, 64)
    blurred = evaluation(_Changed(lambda x: F.avg_pool2d(x, 5, stride=1, padding=2)), nullcontext, tmp_path)
    brighter = evaluation(_Changed(lambda x: x + 0.16), nullcontext, tmp_path)
    assert blurred["psnr_photo"] > brighter["psnr_photo"] == pytest.approx(22, abs=0.5)  # 6.02 - 20 log10(0.16)
    assert blurred["patch_error_photo"] > 3 * brighter["patch_error_photo"] > 0
    same = evaluation(_Changed(lambda x: x + 1e-6), nullcontext, tmp_path)
    assert same["patch_error_photo"] == pytest.approx(0, abs=1e-4)
