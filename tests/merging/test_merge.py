"""Whole merges: files in, files out, the same bytes whatever the threads, and nothing half done."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import full_disk
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import LAYER, LONG, SHAPES, read, tensors_of

from sdft.errors import UserError
from sdft.formats.importance import write_importance
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import DOWN, UP, Layer, LoraFile
from sdft.formats.model_checkpoint import open_checkpoint
from sdft.merging import methods, sparsify
from sdft.merging.__main__ import main
from sdft.merging.compute import CHUNK_SIZE
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.models.load import NANO, pretrained

UNET = "unet/diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).resolve().parents[2]
Model = Callable[..., Path]


def run(method: Callable, inputs: dict, out: Path, numbers: dict | None = None, **options) -> Path:
    """A merge of one step."""
    named = {key: [*map(str, x)] if isinstance(x, list) else str(x) for key, x in inputs.items()}
    step = Step(method, named, numbers or {})
    list(merge({"merged": step}, str(out), **options))
    return out


def digests(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_weighted_sum_of_folders(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    merged = read(run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out", {"alpha": 0.25}))
    x, y = tensors_of(0), tensors_of(1)
    assert merged.keys() == SHAPES.keys()
    for name in SHAPES:
        assert torch.allclose(merged[name].double(), 0.75 * x[name].double() + 0.25 * y[name].double(), atol=1e-6), name
    assert torch.Size(SHAPES[LONG]).numel() > CHUNK_SIZE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    assert (tmp_path / "out" / "tokenizer" / "config.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_are_the_inputs_bit_for_bit(model: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = model("a", 0, dtype), model("b", 1, dtype)
    for alpha, folder in ((0.0, a), (1.0, b)):
        out = run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / f"out{alpha}", {"alpha": alpha})
        expected = read(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read(out).items())
        assert all(tensor.dtype == dtype for tensor in read(out).values())


def test_formats_mix_freely_and_come_out_alike(model: Model, as_file: Callable, tmp_path: Path) -> None:
    a, b = model("a", 0, torch.float16), model("b", 1, torch.float16)
    b_file = as_file(b)
    expected = read(run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "x", {"alpha": 0.3}))
    for name, inputs in {"y": {"a": a, "b": b_file}, "z.safetensors": {"a": a, "b": b_file}}.items():
        found = read(run(methods.weighted_sum, inputs, tmp_path / name, {"alpha": 0.3}))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[weight], expected[weight]) for weight in expected)
    back = run(methods.weighted_sum, {"a": b_file, "b": a}, tmp_path / "w", {"alpha": 0.7}, config=str(a))
    assert json.loads((back / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"


@pytest.mark.parametrize(
    ("method", "suffix"),
    [
        (sparsify.dare_ties, ""),
        (sparsify.dare_ties, ".safetensors"),
        (sparsify.ties, ""),
        (methods.model_stock, ""),
        (methods.cosine_adaptive, ""),
    ],
)
def test_the_same_recipe_gives_the_same_bytes_whatever_the_threads(
    model: Model, tmp_path: Path, method: Callable, suffix: str
) -> None:
    base, a, b = model("base", 0, torch.float16), model("a", 1, torch.float16), model("b", 2, torch.float16)
    changes = {"a": a, "b": b} if method is methods.cosine_adaptive else {"models": [a, b]}
    found = []
    for i, threads in enumerate((1, 1, 2, 4)):
        out = run(method, {"base": base, **changes}, tmp_path / f"{i}/out{suffix}", threads=threads)
        found.append(digests(out))
    assert found[0] == found[1] == found[2] == found[3]


def test_the_recipe_and_the_hashes_are_in_the_file(model: Model, as_file: Callable, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    out = run(methods.weighted_sum, {"a": a, "b": as_file(b)}, tmp_path / "out.safetensors", {"alpha": 0.25})
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    recorded = json.loads(metadata["sdft.merge"])
    expected = {"method": "weighted_sum", "a": "a", "b": "b.safetensors", "alpha": 0.25}
    assert recorded["steps"] == {"merged": expected}
    assert recorded["inputs"]["a"][UNET] == hashlib.sha256((a / UNET).read_bytes()).hexdigest()
    assert recorded["inputs"]["b.safetensors"] == {"b.safetensors": digests(b.with_suffix(".safetensors"))["."]}
    assert metadata["modelspec.merged_from"] == "a, b.safetensors"


def test_a_graph_is_one_pass_and_equals_its_steps(model: Model, tmp_path: Path) -> None:
    paths = {name: str(model(name, i)) for i, name in enumerate(("a", "b", "c"))}
    steps = {
        "end": Step(methods.clamp, {"merged": "sum", "models": [paths["a"], paths["b"]]}),
        "sum": Step(methods.add, {"base": "mean", "delta": "learned"}, {"scale": 0.5}),
        "mean": Step(methods.weighted_sum, {"a": paths["a"], "b": paths["b"]}, {"alpha": 0.4}),
        "learned": Step(methods.difference, {"a": paths["b"], "b": paths["c"]}),
    }
    list(merge(steps, str(tmp_path / "out")))
    a, b, c = (tensors_of(i) for i in range(3))
    for name, found in read(tmp_path / "out").items():
        x, y, z = (one[name].double() for one in (a, b, c))
        expected = torch.clamp(0.6 * x + 0.4 * y + 0.5 * (y - z), torch.minimum(x, y), torch.maximum(x, y))
        assert torch.allclose(found.double(), expected, atol=1e-5), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "out"]


def test_a_number_by_block_and_its_picture(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    numbers = {"alpha": {"middle": 1.0, "input_0": 0.5, "unet": 0.25, "rest": 0.0}}
    merged = read(run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out", numbers))
    x, y = tensors_of(0), tensors_of(1)
    for name, alpha in {
        f"unet/{LAYER}.weight": 1.0,
        "unet/conv_in.weight": 0.5,
        "unet/conv_out.weight": 0.25,
        LONG: 0.0,
    }.items():
        assert torch.allclose(merged[name], x[name] + alpha * (y[name] - x[name]), atol=1e-6), name
    assert (tmp_path / "out.blocks.png").stat().st_size > 500
    merged = read(run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "style", {"alpha": "style"}))
    style = "unet/up_blocks.0.attentions.1.proj_in.weight"
    assert {name for name in SHAPES if not torch.equal(merged[name], x[name])} == {style}


def test_random_masks_differ_between_weights_and_inputs(model: Model, tmp_path: Path) -> None:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    base, a = model("base", **zeros), model("a", **ones)
    b = model("b", **{name: 2 * tensor for name, tensor in ones.items()})
    merged = read(run(sparsify.dare, {"base": base, "models": [a, b]}, tmp_path / "out", {"density": 0.5}))
    # mean of 0 or 2 and of 0 or 4: all four cases occur, so the masks of the inputs differ.
    assert set(merged[LONG].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    q, k = (merged[f"text_encoder_2/text_model.encoder.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert not torch.equal(q, k)
    rows = CHUNK_SIZE // 512
    assert not torch.equal(merged[LONG][:50], merged[LONG][rows : rows + 50])


def test_a_lora_is_a_change_among_models(model: Model, tmp_path: Path) -> None:
    base, tuned = model("base", 0), model("tuned", 1)
    up, down = torch.randn(12, 2), torch.randn(2, 8)
    lora = tmp_path / "lora.safetensors"
    write_lora_file(LoraFile({f"unet/{LAYER}": Layer({DOWN: down, UP: up}, 1.0)}), lora, "kohya")
    out = run(sparsify.ties, {"base": base, "models": [tuned, lora]}, tmp_path / "out", {"density": 1.0, "alpha": 1.0})
    weight = f"unet/{LAYER}.weight"
    x, y = tensors_of(0)[weight], tensors_of(1)[weight]
    delta = torch.stack([y - x, up @ down * 0.5])
    agree = (delta * delta.sum(0) > 0).float()
    assert torch.allclose(read(out)[weight], x + (delta * agree).sum(0) / agree.sum(0), atol=1e-5)


def test_importance_weighs_number_by_number_and_may_be_partial(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    names = [f"unet.{LAYER}.weight", "unet.conv_in.bias"]
    found = [{name: torch.rand(SHAPES[name.replace("unet.", "unet/")]) for name in names} for _ in "ab"]
    files = [tmp_path / f"{i}.safetensors" for i in "ab"]
    for importance, file in zip(found, files, strict=True):
        write_importance(importance, file)
    inputs = {"models": [a, b], "importances": files}
    merged = read(run(methods.fisher, inputs, tmp_path / "out", {"floor": 0.0}))
    x, y = tensors_of(0), tensors_of(1)
    for name in SHAPES:
        f, g = (one.get(name.replace("/", ".", 1), torch.ones(())).double() for one in found)
        expected = (f * x[name].double() + g * y[name].double()) / (f + g)
        assert torch.allclose(merged[name].double(), expected, atol=1e-6), name


def test_nano_merges_into_a_model_that_loads(tmp_path: Path) -> None:
    a = run(methods.weighted_sum, {"a": "nano", "b": "nano"}, tmp_path / "a", {"alpha": 0.3})
    base, merged = (pretrained(str(path)).state_dict() for path in ("nano", a))
    assert all(torch.equal(base[key], merged[key]) for key in base)


def test_a_dry_run_reads_headers_alone(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    step = Step(methods.weighted_sum, {"a": str(a), "b": str(b)})
    lines = list(merge({"merged": step}, str(tmp_path / "out"), dry_run=True))
    assert "  conv_in.weight  F32 [6, 4, 3, 3]  864 bytes" in lines
    assert any(line.startswith(f"reads a={a}: ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1, **{"unet/conv_in.bias": torch.tensor([float("nan")] * 6)})
    message = rf"unet/conv_in.bias: b={b} is damaged, it holds NaN or infinity there; nothing is written"
    with pytest.raises(UserError, match=message):
        run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_nan_is_not_extracted(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0, **{f"unet/{LAYER}.weight": torch.full((12, 8), float("inf"))}), model("b", 1)
    with pytest.raises(UserError, match=rf"unet/{LAYER}.weight: a={a} is damaged"):
        run(methods.difference, {"a": a, "b": b}, tmp_path / "lora.safetensors", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_fp16_cannot_hold_is_refused(model: Model, tmp_path: Path) -> None:
    large = model("b", 1, **{"unet/conv_in.bias": torch.full((6,), 7e4)})
    with pytest.raises(UserError, match=r"a value of .* is too large for its dtype; pass dtype=fp32"):
        run(methods.weighted_sum, {"a": large, "b": large}, tmp_path / "out", dtype="fp16")


def test_a_disk_that_is_full_is_found_before_the_work(model: Model, tmp_path: Path) -> None:
    wide = f"unet/{LAYER}.weight"  # of rank 64 in fp16: 0.37 MiB
    a, b = (model(name, i, **{wide: torch.randn(1500, 1500)}) for i, name in enumerate("ab"))
    needed = sum(tensor.nbytes for tensor in read(a).values()) / 2**20
    with full_disk(100_000):
        with pytest.raises(UserError, match=rf"out={tmp_path}/out: needs {needed:.1f} MiB, .* free there .*make room"):
            run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out")
        with pytest.raises(UserError, match=rf"out={tmp_path}/l.safetensors: needs 0.4 MiB, .* free there"):
            run(methods.difference, {"a": a, "b": b}, tmp_path / "l.safetensors", rank=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
def test_kill_9_leaves_nothing_under_the_final_name(model: Model, tmp_path: Path) -> None:
    wide = {"unet/add_embedding.linear_1.weight": torch.randn(1500, 1500)}  # turning it takes seconds
    a, b = model("a", 0, **wide), model("b", 1, **wide)
    before = digests(a), digests(b)
    words = ["merge=rotate", f"a={a}", f"b={b}", f"out={tmp_path / 'out'}"]
    child = subprocess.Popen([sys.executable, "-m", "sdft.merging", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f".writing-*/out/{UNET}")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (digests(a), digests(b)) == before


def test_what_exists_is_replaced_only_when_asked(model: Model, tmp_path: Path) -> None:
    inputs, out = {"a": model("a", 0), "b": model("b", 1)}, tmp_path / "out"
    run(methods.weighted_sum, inputs, out, {"alpha": 0.25})
    with pytest.raises(UserError, match=r"out=.* exists already; pass overwrite=true"):
        run(methods.weighted_sum, inputs, out)
    run(methods.weighted_sum, inputs, out, {"alpha": 1.0}, overwrite=True)
    assert torch.equal(read(out)[LONG], tensors_of(1)[LONG])
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is not a model, so it is not overwritten"):
        run(methods.weighted_sum, inputs, tmp_path / "precious", overwrite=True)


def test_every_weight_that_does_not_fit_is_named(model: Model, tmp_path: Path) -> None:
    a = model("a", 0, **{"unet/conv_norm_out.bias": torch.ones(2)})
    b = model("b", 1, **{"unet/conv_in.bias": torch.ones(7)})
    with pytest.raises(UserError) as caught:
        run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out")
    first, *lines = str(caught.value).splitlines()
    assert first == "the inputs differ in 2 weights, so they cannot be merged:"
    assert lines == [
        f"  only in a={a}: unet/conv_norm_out.bias",
        f"  unet/conv_in.bias: [6] in a={a}, [7] in b={b}",
    ]


def test_the_command(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    a, b = model("a", 0), model("b", 1)
    words = [f"a={a}", f"b={b}", f"out={tmp_path / 'out'}", "alpha=0.25"]
    monkeypatch.setattr(sys, "argv", ["sdft.merging", *words])
    main()
    assert torch.allclose(read(tmp_path / "out")[LONG], torch.lerp(tensors_of(0)[LONG], tensors_of(1)[LONG], 0.25))
    printed = capsys.readouterr().out
    assert "alpha=0.25" in printed
    assert f"python eval.py subjects='{{a: {a}, b: {b}, merged: {tmp_path / 'out'}}}'" in printed
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_a_recipe_file_and_a_sweep_of_its_numbers(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    a, b = model("a", 0), model("b", 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"numbers: {{alpha: 0.5}}\n"
        f"steps:\n"
        f"  learned: {{method: difference, a: {b}, b: {a}}}\n"
        f"  end: {{method: add, base: {a}, delta: learned, scale: '${{numbers.alpha}}'}}\n"
    )
    out = str(tmp_path / "out_") + "${numbers.alpha}"
    words = ["-m", "merge=recipe", f"file={recipe}", f"out='{out}'", "+numbers.alpha=0.25,1.0"]
    monkeypatch.setattr(sys, "argv", ["sdft.merging", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    main()
    x, y = tensors_of(0)[LONG], tensors_of(1)[LONG]
    for alpha in (0.25, 1.0):
        assert torch.allclose(read(tmp_path / f"out_{alpha}")[LONG], x + alpha * (y - x), atol=1e-5)


def test_shards_of_a_model_are_found(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    whole = {name.split("/", 1)[1]: tensor for name, tensor in tensors_of(1).items() if name.startswith("unet/")}
    (b / UNET).unlink()
    save_file({"conv_in.bias": whole.pop("conv_in.bias")}, b / "unet" / "model-00001-of-00002.safetensors")
    save_file(whole, b / "unet" / "model-00002-of-00002.safetensors")
    merged = read(run(methods.weighted_sum, {"a": a, "b": b}, tmp_path / "out", {"alpha": 1.0}))
    assert torch.equal(merged["unet/conv_in.bias"], tensors_of(1)["unet/conv_in.bias"])


def test_a_single_file_of_nano_merges_back_to_the_same_weights(tmp_path: Path) -> None:
    """Stacked, transposed and reshaped tensors of LDM's layout, written piece by piece, against the plain folder."""
    file = run(methods.weighted_sum, {"a": "nano", "b": "nano"}, tmp_path / "nano.safetensors", {"alpha": 0.0})
    found, expected = read(file), read(NANO)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert open_checkpoint("in", file).unknown == []
