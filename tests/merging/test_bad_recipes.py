"""Wrong merges are refused in one sentence that names the key, before any weight is read and anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import LAYER, SHAPES, tensors_of, write_model

from sdft.formats.importance import write_importance
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import DORA, DOWN, UP, Layer, LoraFile
from sdft.formats.model_checkpoint import Checkpoint
from sdft.merging.__main__ import main

LINES = [
    ("merge=weighted_sm a={a} b={b}", "'merge' has no option 'weighted_sm'; did you mean 'weighted_sum'"),
    ("a={a}", "b is not set: pass b=..."),
    ("a={a} b={b} c={c}", "'c' means nothing with merge=weighted_sum"),
    ("a={a} b={b} alhpa=0.3", "did you mean 'alpha'"),
    ("a={a} b={b} alpha=1.5", "error: alpha=1.5: must be less than or equal to 1"),
    ("a={a} b={b} alpha=styel", "did you mean 'style'"),
    ("a={a} b={b} threads=0", "error: threads=0: must be greater than or equal to 1"),
    ("a=nowhere b={b}", "a=nowhere: there is no such file or folder"),
    ("a={a} b={pickle}", "is not a .safetensors file"),
    ("a={a} b={cut}", "cut.safetensors is truncated or not a safetensors file"),
    ("a={a} b={sd15}", "is a Stable Diffusion 1 or 2 model"),
    ("a={a} b={v}", "predicts epsilon and b={v} v_prediction"),
    ("a={a} b={lacking}", "only in a={a}: unet/conv_in.bias"),
    ("a={a} b={misshapen}", "unet/conv_in.bias: [6] in a={a}, [7] in b={misshapen}"),
    ("a={a} b={lora}", "b={lora}: is a delta, and weighted_sum needs a weight"),
    ("merge=bake base={a} lora={b}", "lora={b}: is a weight, and add needs a delta"),
    ("merge=bake base={a} lora={misfit}", "a delta of 8 x 8 in delta={misfit}"),
    ("merge=lora_sum loras=[{dora}] rank=2 out=x.safetensors", "is a DoRA, whose change depends on the model"),
    ("merge=extract a={a} b={b} out=x.safetensors", "rank is not set: the result is a LoRA"),
    ("merge=extract a={a} b={b} rank=2", "the result is a file that ends in .safetensors"),
    ("a={a} b={b} to=kohya", "to=kohya: the result is a whole model"),
    ("a={a} b={b} to=single_file", "the result is a file that ends in .safetensors"),
    ("a={a} b={b} out={a}/inside", "contains the input a={a} or is inside it"),
    ("a={a} b={b} 'alpha={{input_40: 1.0}}'", "alpha: there is no block 'input_40'"),
    ("a={a} b={b} 'alpha={{unet: 1.0}}'", "alpha: has no number for text_encoder, text_encoder_2, vae"),
    ("merge=ties base={a} models={b}", "ties takes a list of inputs"),
    ("merge=ties base={a} models=[{b}] density=0", "density=0: must be greater than 0"),
    ("merge=model_stock base={a} models=[{b}]", "model_stock needs at least 2 inputs"),
    ("merge=linear models=[{a},{b}] shares=[1]", "shares: 1 for 2 models; one for each"),
    ("merge=fisher models=[{a},{b}] importances=[{measured}]", "importances: 1 for 2 models; one for each"),
    ("merge=fisher models=[{a},{b}] importances=[{a},{b}]", "is a weight, and fisher needs an importance; only"),
    ("merge=ties base={a} models=[{measured}]", "is an importance, and ties needs a task vector"),
    ("merge=fisher models=[{a}] importances=[{unlike}]", "conv_in.bias: [3] in importances={unlike}, [6] in"),
]
RECIPES = [
    ("steps: {x: {method: tise, base: A, models: [B]}}", "x.method=tise: there is no such method; did you mean 'ties'"),
    ("steps: {x: {method: add, base: y, delta: L}, y: {method: add, base: x, delta: L}}", "form a cycle"),
    (
        "steps: {x: {method: add, base: y, delta: L}, y: {method: add, base: x, delta: L},"
        " z: {method: weighted_sum, a: x, b: A}}",
        "cycle: x -> y -> x",
    ),
    ("steps: {x: {method: weighted_sum, a: A, b: B, alhpa: 1}}", "x.alhpa: weighted_sum has no such argument; did you"),
    ("steps: {x: {method: weighted_sum, a: A, b: B, alpha: much}}", "x.alpha=much: must be"),
    ("steps: {x: {method: weighted_sum, a: A}}", "b is not set: weighted_sum needs it"),
    ("steps: {x: {method: difference, a: A, b: B}, y: {method: weighted_sum, a: x, b: A}}", "y.a=x: is a delta"),
    ("steps: {x: {method: slerp, a: A, b: B}, y: {method: slerp, a: A, b: B}}", "steps x and y are not used"),
    ("steps: {x: {method: slerp, a: A, b: B, gram: 1}}", "x.gram: slerp has no such argument; it takes a, b, alpha"),
    ("steps: {x: {method: slerp, a: A, b: B, alpha: '${numbers.alpha}'}}", "numbers"),
    ("stesp: {}", "has no `steps:`"),
    ("steps: {x: [", "while parsing"),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Inputs, most of them wrong."""
    made = {name: write_model(tmp_path / name, tensors_of(i)) for i, name in enumerate("abc")}
    made["v"] = write_model(tmp_path / "v", tensors_of(0), "v_prediction")
    lacking, misshapen = tensors_of(0), tensors_of(0)
    del lacking["unet/conv_in.bias"]
    misshapen["unet/conv_in.bias"] = torch.ones(7)
    made["lacking"] = write_model(tmp_path / "lacking", lacking)
    made["misshapen"] = write_model(tmp_path / "misshapen", misshapen)
    rows, columns = SHAPES[f"unet/{LAYER}.weight"]
    for name, held in {
        "lora": {UP: torch.ones(rows, 2), DOWN: torch.ones(2, columns)},
        "dora": {UP: torch.ones(rows, 2), DOWN: torch.ones(2, columns), DORA: torch.ones(rows, 1)},
        "misfit": {UP: torch.ones(8, 2), DOWN: torch.ones(2, 8)},
    }.items():
        made[name] = tmp_path / f"{name}.safetensors"
        write_lora_file(LoraFile({f"unet/{LAYER}": Layer(held, 2.0)}), made[name], "kohya")
    for name, size in {"measured": 6, "unlike": 3}.items():
        made[name] = tmp_path / f"{name}.safetensors"
        write_importance({"unet.conv_in.bias": torch.ones(size)}, made[name])
    made["sd15"] = tmp_path / "sd15.safetensors"
    names = ("cond_stage_model.transformer.x", "model.diffusion_model.out.2.bias")
    save_file({name: torch.ones(1) for name in names}, made["sd15"])
    made["cut"], made["pickle"] = tmp_path / "cut.safetensors", tmp_path / "model.ckpt"
    made["cut"].write_bytes(made["sd15"].read_bytes()[:-2])
    made["pickle"].write_bytes(b"")
    return made


@pytest.fixture
def refused(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[[list[str]], str]:
    """The error of a command; fails where a weight was read or anything was written."""

    def read(*arguments: object) -> None:
        raise AssertionError("weights were read before the recipe was found wrong")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.chdir(tmp_path)

    def error_of(words: list[str]) -> str:
        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["sdft.merging", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert sorted(tmp_path.iterdir()) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        # Weights that do not fit each other are listed, one a line.
        assert message.count("\n") == 1 or "the inputs differ in 1 weights" in message
        return message

    return error_of


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line for line, _ in LINES])
def test_a_wrong_command(line: str, message: str, files: dict[str, Path], refused: Callable) -> None:
    words = [word.strip("'") for word in line.format(**files).replace(": ", ":").split()]
    words += [] if "out=" in line else ["out=x"]
    assert message.format(**files) in refused(words)


@pytest.mark.parametrize(("recipe", "message"), RECIPES, ids=[recipe for recipe, _ in RECIPES])
def test_a_wrong_recipe(recipe: str, message: str, files: dict[str, Path], refused: Callable, tmp_path: Path) -> None:
    for letter, name in {": A": "a", ": B": "b", ": L": "lora", "[B]": "b"}.items():
        path = f": {files[name]}" if letter[0] == ":" else f"[{files[name]}]"
        recipe = recipe.replace(letter, path)
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert message in refused(["merge=recipe", "file=recipe.yaml", "out=x"])


def test_a_number_that_the_recipe_does_not_have(files: dict[str, Path], refused: Callable, tmp_path: Path) -> None:
    steps = f"steps: {{x: {{method: slerp, a: {files['a']}, b: {files['b']}, alpha: '${{numbers.alpha}}'}}}}"
    (tmp_path / "recipe.yaml").write_text(f"numbers: {{alpha: 0.1}}\n{steps}")
    message = refused(["merge=recipe", "file=recipe.yaml", "out=x", "+numbers.alhpa=0.3"])
    assert "numbers.alhpa: recipe.yaml has no such number; did you mean 'alpha'?" in message


def test_a_recipe_that_is_not_there(refused: Callable) -> None:
    assert "file=none.yaml: cannot be read" in refused(["merge=recipe", "file=none.yaml", "out=x"])
