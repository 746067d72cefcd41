"""Merging: numbers worked by hand, files that other programs open, and every way to be refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdft.config import ConfigError, check, compose
from sdft.merging.__main__ import main
from sdft.merging.files import merge
from sdft.merging.methods import weighted_sum
from sdft.models.load import NANO, pretrained
from sdft.types import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"


def model_folder(folder: Path, **tensors: torch.Tensor) -> Path:
    """The smallest folder with the shape of a diffusers model."""
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Tiny", "unet": ["d", "U"], "scheduler": ["d", "S"]}')
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    return folder


def single_file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one kind, with three dtypes."""
    ids = torch.arange(3)
    a = model_folder(tmp_path / "a", w=torch.tensor([1.0, 2.0]), half=torch.ones(3, dtype=torch.float16), ids=ids)
    b = model_folder(tmp_path / "b", w=torch.tensor([3.0, 6.0]), half=torch.full((3,), 2.0), ids=ids)
    return a, b


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_weighted_sum_by_hand() -> None:
    mean = weighted_sum(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), 0.25)
    assert mean.tolist() == [1.5, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_are_the_inputs_bit_for_bit(dtype: torch.dtype) -> None:
    a = torch.tensor([-0.0, 1 / 3, float("nan"), 6e-8], dtype=dtype)
    b = torch.tensor([0.0, -0.0, float("inf"), -2 / 3], dtype=dtype)
    assert bits(weighted_sum(a, b, 0.0)) == bits(a)
    assert bits(weighted_sum(a, b, 1.0)) == bits(b)


def test_the_sum_is_computed_in_fp32_and_rounded_once() -> None:
    a, b = (torch.randn(10_000, generator=torch.Generator().manual_seed(seed)).half() for seed in (0, 1))
    exact = (0.7 * a.double() + 0.3 * b.double()).half()
    mean = weighted_sum(a, b, 0.3)
    assert mean.dtype == torch.float16
    # One rounding of the fp32 sum: it is off the exact one only at near ties.
    assert (mean != exact).float().mean() < 0.01


def test_equal_tensors_stay_equal() -> None:
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for alpha in (0.1, 0.4, 0.7):
        assert torch.equal(weighted_sum(a, a.clone(), alpha), a)


def test_folders_merge_into_a_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = merge(str(pair[0]), str(pair[1]), str(tmp_path / "out"), alpha=0.25)
    merged = load_file(out / UNET)
    assert merged["w"].tolist() == [1.5, 3.0]
    assert (merged["half"].dtype, merged["half"].tolist()) == (torch.float16, [1.25] * 3)
    assert merged["ids"].tolist() == [0, 1, 2]
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_the_recipe_and_the_hashes_of_the_inputs_are_in_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = merge(str(pair[0]), str(pair[1]), str(tmp_path / "out"), alpha=0.25)
    with safe_open(out / UNET, framework="pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["sdft.merge"])
    assert (recipe["method"], recipe["alpha"], recipe["b"]["name"]) == ("weighted_sum", 0.25, "b")
    for key, folder in zip("ab", pair, strict=True):
        assert recipe[key]["sha256"] == {UNET: hashlib.sha256((folder / UNET).read_bytes()).hexdigest()}
    assert metadata["format"] == "pt"
    assert metadata["modelspec.merged_from"] == "a, b"


def test_the_same_recipe_gives_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (merge(str(pair[0]), str(pair[1]), str(tmp_path / name), alpha=0.3) for name in ("x", "y"))
    assert (first / UNET).read_bytes() == (second / UNET).read_bytes()


def test_single_files_merge_into_a_file(tmp_path: Path) -> None:
    a = single_file(tmp_path / "a.safetensors", w=torch.tensor([[1.0], [2.0]]), scalar=torch.tensor(2.0))
    b = single_file(tmp_path / "b.safetensors", w=torch.tensor([[3.0], [6.0]]), scalar=torch.tensor(4.0))
    merged = load_file(merge(str(a), str(b), str(tmp_path / "out.safetensors"), alpha=0.5))
    assert merged["w"].tolist() == [[2.0], [4.0]]
    assert merged["scalar"].item() == 3.0


def test_shards_of_b_are_found_under_any_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    b = pair[1] / "unet"
    whole = load_file(b / Path(UNET).name)
    (b / Path(UNET).name).unlink()
    save_file({"w": whole.pop("w")}, b / "model-00001-of-00002.safetensors")
    save_file(whole, b / "model-00002-of-00002.safetensors")
    out = merge(str(pair[0]), str(pair[1]), str(tmp_path / "out"), alpha=0.25)
    assert load_file(out / UNET)["w"].tolist() == [1.5, 3.0]


def test_nano_merges_with_a_changed_copy_into_a_model_that_loads(tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(NANO, changed)
    weights = load_file(changed / UNET)
    name = "conv_in.weight"
    save_file({**weights, name: weights[name] + 1}, changed / UNET, metadata={"format": "pt"})
    out = merge("nano", str(changed), str(tmp_path / "out"), alpha=0.25)
    base, merged = (pretrained(str(path)).state_dict() for path in ("nano", out))
    assert torch.allclose(merged[f"unet.{name}"], base[f"unet.{name}"] + 0.25, atol=2e-3)
    assert all(torch.equal(base[key], merged[key]) for key in base if key != f"unet.{name}")


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    one = torch.ones(1)
    a = single_file(tmp_path / "a.safetensors", same=one, mine=one, mine_too=one, wide=torch.ones(2, 3), kind=one)
    b = single_file(tmp_path / "b.safetensors", same=one, yours=one, wide=torch.ones(3, 2), kind=one.int())
    with pytest.raises(UserError) as caught:
        merge(str(a), str(b), str(tmp_path / "out.safetensors"))
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert lines == {
        "only in a: mine",
        "only in a: mine_too",
        "only in b: yours",
        "wide: [2, 3] in a, [3, 2] in b",
        "kind: F32 in a, I32 in b",
    }
    assert not (tmp_path / "out.safetensors").exists()


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    a = single_file(tmp_path / "a.safetensors", w=torch.ones(2), z_ids=torch.tensor([1]))
    b = single_file(tmp_path / "b.safetensors", w=torch.ones(2), z_ids=torch.tensor([2]))
    with pytest.raises(UserError, match="z_ids: holds integers that differ"):
        merge(str(a), str(b), str(tmp_path / "out.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_exists_is_replaced_only_when_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b, out = str(pair[0]), str(pair[1]), tmp_path / "out"
    merge(a, b, str(out), alpha=0.25)
    with pytest.raises(UserError, match=r"out=.* exists already; pass overwrite=true"):
        merge(a, b, str(out), alpha=0.5)
    merge(a, b, str(out), alpha=0.5, overwrite=True)
    assert load_file(out / UNET)["w"].tolist() == [2.0, 4.0]
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(UserError, match="is no model, so it is not overwritten"):
        merge(a, b, str(precious), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "precious"]


def test_wrong_inputs_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, out = str(pair[0]), str(tmp_path / "out")
    lora = single_file(tmp_path / "l.safetensors", **{"unet.to_q.lora_A.weight": torch.ones(1)})
    plain = single_file(tmp_path / "p.safetensors", w=torch.ones(1))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor at all")
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"")
    v_model = tmp_path / "v"
    shutil.copytree(pair[1], v_model)
    (v_model / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    run = tmp_path / "run"
    shutil.copytree(pair[1], run / "model")
    for b, target, told in [
        ("nowhere", out, "b=nowhere: there is no such file or folder"),
        (str(broken), out, "b=.*broken.safetensors is damaged"),
        (str(pickle), out, "b=.*is no .safetensors file"),
        (str(lora), out, "b=.*is an adapter"),
        (str(plain), out, "one is a folder, the other a single file"),
        (str(v_model), out, "a predicts epsilon and b v_prediction"),
        (str(run), out, "b=.*no model_index.json.*pass .*run/model"),
        (str(pair[1]), out + ".safetensors", "out=.*the result is a folder"),
        (str(pair[1]), a + "/inside", "out=.*lies in a"),
    ]:
        with pytest.raises(UserError, match=told):
            merge(a, b, target)


def test_a_network_without_safetensors_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / UNET).rename(pair[1] / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"unet has no .safetensors file; pickles are not read"):
        merge(str(pair[0]), str(pair[1]), str(tmp_path / "out"))


def test_the_verb(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"a={pair[0]}", f"b={pair[1]}", f"out={tmp_path / 'out'}", "alpha=0.25"]
    monkeypatch.setattr(sys, "argv", ["sdft.merging", *words])
    main()
    assert load_file(tmp_path / "out" / UNET)["w"].tolist() == [1.5, 3.0]
    assert "0.75 x" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["b=nano", "out=x"], "a is not set: pass a=..."),
        (["a=nano", "b=nano", "out=x", "alpha=1.5"], "alpha=1.5: must be less than or equal to 1"),
        (["a=nano", "b=nano", "out=x", "alhpa=0.5"], "did you mean 'alpha'"),
    ],
)
def test_the_config_refuses(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        check(compose("merge", words))
