"""nano through every format of a whole model and back, bit for bit, and into diffusers' own loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from warm import WarmPython

from sdft.formats.convert import convert
from sdft.formats.model_checkpoint import LOGIT_SCALE, open_checkpoint
from sdft.models.load import NANO, pretrained

PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """nano as one file."""
    return convert(str(NANO), str(tmp_path_factory.mktemp("nano") / "nano.safetensors"), "single_file", NANO)


@pytest.fixture(scope="module")
def folder(single: Path) -> Path:
    """nano as one file, as a folder again."""
    return convert(str(single), str(single.parent / "again"), "folder", NANO)


def same_weights(a: Path, b: Path) -> None:
    first, second = open_checkpoint("a", a), open_checkpoint("b", b)
    assert first.weights.keys() == second.weights.keys()
    with first.opened() as x, second.opened() as y:
        for name in first.weights:
            assert x(name).dtype == y(name).dtype
            assert torch.equal(x(name), y(name)), name


def test_folder_to_single_file_to_folder_is_bit_identical(single: Path, folder: Path) -> None:
    same_weights(NANO, folder)
    assert len(load_file(single)) == 498 + 36 + 37 - 8 + 184 + 1  # q, k and v of two layers in one; the logit scale
    for file in ("model_index.json", "unet/config.json", "tokenizer_2/tokenizer.json"):
        assert (folder / file).read_bytes() == (NANO / file).read_bytes()


def test_single_file_to_folder_to_single_file_has_the_same_bytes(single: Path, folder: Path) -> None:
    first = load_file(single)
    again = load_file(convert(str(folder), str(folder.parent / "again.safetensors"), "single_file", NANO))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)


def test_a_logit_scale_of_ones_own_survives_the_way_through_a_folder(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    assert tensors[LOGIT_SCALE].item() == pytest.approx(4.6055, abs=1e-4)
    tensors[LOGIT_SCALE] = torch.tensor(3.25, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "odd.safetensors")
    convert(str(tmp_path / "odd.safetensors"), str(tmp_path / "folder"), "folder", NANO)
    back = load_file(convert(str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "single_file", NANO))
    assert back[LOGIT_SCALE].item() == 3.25
    assert back[LOGIT_SCALE].dtype == torch.bfloat16


def draw(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red cat", generator=torch.Generator().manual_seed(1), **options).images


def test_diffusers_reads_both_and_draws_the_same_picture(single: Path, folder: Path) -> None:
    options = {"dtype": torch.float32, "add_watermarker": False}
    expected = draw(StableDiffusionXLPipeline.from_pretrained(NANO, **options))
    assert np.array_equal(draw(StableDiffusionXLPipeline.from_pretrained(folder, **options)), expected)
    one = StableDiffusionXLPipeline.from_single_file(str(single), config=str(NANO), **options)
    assert np.abs(draw(one) - expected).max() < 1e-5


def test_pooled_is_openclips_formula_on_the_single_file(single: Path) -> None:
    """OpenCLIP multiplies by its matrix from the right: a forgotten transpose would show, square as it is."""
    model, tensors = pretrained(str(single)), load_file(single)
    with torch.no_grad():
        _, pooled_BP = model.encode_prompts(["a blue bird in the snow"])
        ids_BL = torch.tensor([model.tokenizer_2("a blue bird in the snow", padding="max_length").input_ids])
        last = model.text_encoder_2(ids_BL).last_hidden_state
        at_eos = last[:, ids_BL[0].tolist().index(model.tokenizer_2.eos_token_id)]
        expected = at_eos @ tensors[PROJECTION].float()
        forgotten = at_eos @ tensors[PROJECTION].float().T
    assert torch.allclose(pooled_BP, expected, atol=1e-5)
    assert not torch.allclose(pooled_BP, forgotten, atol=1e-2)


def test_the_metadata_describes_the_file(single: Path) -> None:
    with safe_open(single, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.hash_sha256"].startswith("0x")
    assert set(metadata["modelspec.hash_sha256"][2:]) != {"0"}


def test_the_hash_is_that_of_the_tensors_bytes(single: Path) -> None:
    import hashlib

    content = single.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with safe_open(single, framework="pt") as file:
        assert file.metadata()["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[start:]).hexdigest()


def test_a_v_prediction_model_is_recognised_in_every_format(tmp_path: Path) -> None:
    model = pretrained("nano")
    model.set_prediction_type("v_prediction", zero_terminal_snr=True)
    from sdft.formats.diffusers_folder import write_folder

    write_folder(model, tmp_path / "v", torch.float16)
    file = convert(str(tmp_path / "v"), str(tmp_path / "v.safetensors"), "single_file", NANO)
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    convert(str(file), str(tmp_path / "again"), "folder", NANO)
    for source in (tmp_path / "v", file, tmp_path / "again"):
        config = pretrained(str(source)).scheduler.config
        assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
        assert config.timestep_spacing == "trailing"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in ("v_pred", "ztsnr")}
    save_file(tensors, tmp_path / "named.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert pretrained(str(tmp_path / "named.safetensors")).scheduler.config.prediction_type == "v_prediction"
    save_file(tensors, tmp_path / "silent.safetensors")
    assert pretrained(str(tmp_path / "silent.safetensors")).scheduler.config.prediction_type == "epsilon"


def test_another_dtype_only_rounds(single: Path, tmp_path: Path) -> None:
    wide = load_file(convert(str(single), str(tmp_path / "wide.safetensors"), "single_file", NANO, dtype="fp32"))
    assert all(torch.equal(wide[name].half(), tensor) for name, tensor in load_file(single).items())
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_a_pickle_is_converted_only_on_request(single: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(single), "epoch": 3}, tmp_path / "old.ckpt")
    convert(str(tmp_path / "old.ckpt"), str(tmp_path / "new.safetensors"), "single_file", NANO, allow_pickle=True)
    same_weights(single, tmp_path / "new.safetensors")


def test_the_command_converts_and_prints_the_path(single: Path, python: WarmPython, tmp_path: Path) -> None:
    words = [f"in={single}", f"out={tmp_path / 'folder'}", "to=folder", "config=nano"]
    done = python.complete(["-m", "sdft.formats", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "folder") in done.stdout
    same_weights(tmp_path / "folder", NANO)


def test_killed_while_writing_leaves_nothing_under_the_final_name(python: WarmPython, tmp_path: Path) -> None:
    """The process dies without a chance to clean up, in the middle of the tensors."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "import sdft.formats.safetensors_io as safetensors_io\n"
        "from sdft.formats.convert import convert\n"
        "from sdft.models.load import NANO\n"
        "count = 0\n"
        "def dying(*args):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 300: os.kill(os.getpid(), 9)\n"
        "safetensors_io.tqdm.update = dying\n"
        "convert(sys.argv[1], sys.argv[2], 'single_file', NANO)\n"
    )
    out = tmp_path / "never.safetensors"
    assert python.complete([str(script), str(NANO), str(out)], tmp_path).returncode == -9
    assert not out.exists()
    assert any(tmp_path.glob(".writing-*/never.safetensors"))
