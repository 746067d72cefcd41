"""Rotations, and norms and biases beside them: the same run in other batches, and on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import slow
from safetensors.torch import load_file
from small_runs import Run, result

OPTIONS = {
    "oft": {"alpha": None, "rank": 4, "method": "oft", "train_norms": True, "train_biases": True},
    "boft": {"alpha": None, "rank": 6, "method": "boft"},
}
ALIKE = {
    "accumulated": {"batch_size": 2, "accumulate": 2},
    "recomputed": {"batch_size": 4, "recompute": True},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp", "recompute": True},
}


@pytest.mark.parametrize(
    ("method", "other"),
    [
        ("oft", "accumulated"),
        ("oft", "fsdp"),
        slow("oft", "recomputed"),
        slow("oft", "ddp"),
        slow("boft", "accumulated"),
    ],
)
def test_the_same_steps(method: str, other: str, tmp_path: Path) -> None:
    """Four pictures at once, as two by two, or two on each of two processes; and what they export."""

    def run(name: str, world_size: int = 1, **options: Any) -> dict[str, Any]:
        settings = {"tuning_options": OPTIONS[method], "max_steps": 4, "export": True, **options}
        return result(Run(tmp_path / name, "lora_unet", **settings), world_size)

    one = run("one", batch_size=4)
    many = run("many", 2 if "strategy" in ALIKE[other] else 1, **ALIKE[other])
    assert any("norm" in name for name in one["weights"]) == (method == "oft")
    assert one["weights"].keys() == many["weights"].keys()
    apart = max(float((weight - many["weights"][name]).abs().max()) for name, weight in one["weights"].items())
    assert apart < 1e-4  # of 4e-2 that four steps move at most
    files = [load_file(tmp_path / name / "lora_kohya.safetensors") for name in ("one", "many")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], atol=2e-4, rtol=1e-2)
