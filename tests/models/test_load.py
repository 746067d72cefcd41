"""Weights from every place, strictly: all or nothing, in the dtype asked for, and by the attention asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import load_file, save_file

from sdft.batch import Conditioning
from sdft.errors import UserError
from sdft.formats.convert import convert
from sdft.formats.keys import PREFIXES
from sdft.formats.model_checkpoint import open_checkpoint
from sdft.models.attention import refuse_device
from sdft.models.load import NANO, pretrained


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return convert(str(NANO), str(tmp_path_factory.mktemp("nano") / "nano.safetensors"), "single_file", NANO)


@torch.no_grad()
def predict(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    cond = Conditioning(*model.encode_prompts(["a red cat"]), torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    return model.denoise(torch.randn(1, 4, 16, 16, generator=g), torch.tensor([500]), cond)


def test_every_bit_is_as_diffusers_reads_it(single: Path) -> None:
    theirs = StableDiffusionXLPipeline.from_pretrained(NANO, dtype=torch.float32, add_watermarker=False)
    for source in ("nano", str(NANO), str(single)):
        ours = pretrained(source)
        for part in PREFIXES:
            a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a), part


def test_each_part_is_read_into_its_own_dtype(single: Path) -> None:
    model = pretrained(str(single), dtype={"unet": "bf16", "text_encoder": "fp16"})
    dtypes = {part: {p.dtype for p in getattr(model, part).parameters()} for part in PREFIXES}
    assert dtypes == {
        "unet": {torch.bfloat16},
        "text_encoder": {torch.float16},
        "text_encoder_2": {torch.float32},
        "vae": {torch.float32},
    }
    assert predict(model).dtype == torch.float32
    assert (predict(model) - predict(pretrained("nano"))).abs().max() < 0.1


def test_weights_of_the_right_dtype_stay_in_the_mapped_file(single: Path) -> None:
    """Nothing was copied, and what is changed in memory does not reach the file."""
    before = single.read_bytes()
    model = pretrained(str(single), dtype={"unet": "fp16"})
    weight = model.unet.mid_block.resnets[0].conv1.weight
    maps = [row.split() for row in Path("/proc/self/maps").read_text().splitlines() if row.endswith(str(single))]
    ranges = [[int(end, 16) for end in row[0].split("-")] for row in maps]
    assert any(start <= weight.data_ptr() < end for start, end in ranges)
    with torch.no_grad():
        weight.zero_()
    assert single.read_bytes() == before


def test_of_many_weights_that_do_not_fit_the_first_are_named(single: Path, tmp_path: Path) -> None:
    """As with a file of another architecture: nobody reads hundreds of lines."""
    tensors = load_file(single)
    gone = [name for name in tensors if name.startswith(PREFIXES["unet"])][:50]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="50 weights do not fit") as raised:
        pretrained(str(tmp_path / "bad.safetensors"))
    lines = str(raised.value).splitlines()
    assert len(lines) == 22
    assert all(line.startswith("  missing: unet/") for line in lines[1:-1])
    assert lines[-1] == "  and 30 more"


def test_all_that_does_not_fit_is_named_and_nothing_is_loaded(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    gone = f"{PREFIXES['unet']}input_blocks.4.1.proj_in.bias"
    stacked = f"{PREFIXES['text_encoder_2']}transformer.resblocks.0.attn.in_proj_bias"
    wide = f"{PREFIXES['vae']}decoder.conv_out.weight"
    del tensors[gone], tensors[stacked]
    tensors[f"{PREFIXES['unet']}extra.weight"] = torch.zeros(2)
    tensors[wide] = torch.zeros(3, 24, 3, 3)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as raised:
        pretrained(str(tmp_path / "bad.safetensors"))
    message = str(raised.value)
    assert "6 weights do not fit" in message
    assert "missing: unet/down_blocks.1.attentions.0.proj_in.bias" in message
    for x in "qkv":
        assert f"missing: text_encoder_2/text_model.encoder.layers.0.self_attn.{x}_proj.bias" in message
    assert f"unexpected: {PREFIXES['unet']}extra.weight" in message
    assert "of another shape: vae/decoder.conv_out.weight is [3, 24, 3, 3], must be [3, 16, 3, 3]" in message


def test_a_folder_is_read_as_strictly(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("text_model.final_layer_norm.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: text_encoder/text_model\.final_layer_norm\.bias"):
        pretrained(str(tmp_path / "model"))


def test_encoder_1_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    """Keys of folders on the Hub start with `text_model.`; those that transformers 5 saves do not."""
    shutil.copytree(NANO, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(predict(pretrained(str(tmp_path / "model"))), predict(pretrained("nano")))


def other_vae(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A VAE folder whose weights are those of nano, and one more."""
    shutil.copytree(NANO / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return tmp_path / "vae", tensors


def test_the_vae_is_replaced_by_a_folder_a_file_and_a_checkpoint(single: Path, tmp_path: Path) -> None:
    folder, tensors = other_vae(tmp_path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in tensors.items():
        for today, once in old_names.items():
            name = name.replace(f".{today}.", f".{once}.")
        old[name] = tensor
    save_file(old, tmp_path / "old.safetensors")
    model = open_checkpoint("a", single)
    with model.opened() as read:
        ldm = {
            view.stored.name.removeprefix(PREFIXES["vae"]): view.place.to_single([read(weight) + 1]).contiguous()
            for weight, view in model.weights.items()
            if weight.startswith("vae/")
        }
    save_file(ldm, tmp_path / "ldm.safetensors")
    whole = load_file(single) | {PREFIXES["vae"] + name: tensor for name, tensor in ldm.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    for vae in (folder, tmp_path / "old.safetensors", tmp_path / "ldm.safetensors", tmp_path / "whole.safetensors"):
        loaded = pretrained("nano", vae=str(vae)).vae.state_dict()
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items()), vae


def test_a_checkpoint_without_a_vae_needs_one(single: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(single).items() if not name.startswith(PREFIXES["vae"])}
    save_file(tensors, tmp_path / "no_vae.safetensors")
    with pytest.raises(UserError, match=r"has no VAE; pass model\.vae="):
        pretrained(str(tmp_path / "no_vae.safetensors"))
    model = pretrained(str(tmp_path / "no_vae.safetensors"), vae=str(NANO / "vae"))
    assert torch.equal(predict(model), predict(pretrained("nano")))


def test_a_pickle_needs_the_flag_and_never_runs_code(single: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(single)}, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"pickle can run code.*sdft\.formats"):
        pretrained(str(tmp_path / "old.ckpt"))
    model = pretrained(str(tmp_path / "old.ckpt"), allow_pickle=True)
    assert torch.equal(predict(model), predict(pretrained("nano")))
    torch.save({"state_dict": load_file(single), "hook": Path("x")}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="has more than weights"):
        pretrained(str(tmp_path / "odd.ckpt"), allow_pickle=True)


def test_a_variant_is_chosen_by_name(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model")
    for part in PREFIXES:
        (file,) = (tmp_path / "model" / part).glob("*.safetensors")
        shutil.copy(file, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    assert torch.equal(predict(pretrained(str(tmp_path / "model"), variant="fp16")), predict(pretrained("nano")))
    assert predict(pretrained(str(tmp_path / "model"))).abs().max() == 0


@pytest.mark.parametrize(
    ("attention", "processor"), [("sdpa", AttnProcessor2_0), ("eager", AttnProcessor), ("sliced", SlicedAttnProcessor)]
)
def test_the_attention_that_is_asked_for_is_everywhere_and_means_the_same(attention: str, processor: type) -> None:
    model = pretrained("nano", attention=attention)
    assert {type(one) for one in model.unet.attn_processors.values()} == {processor}
    assert torch.allclose(predict(model), predict(pretrained("nano")), atol=1e-5)


def test_xformers_is_refused_where_it_cannot_run(monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match=r"model\.attention=xformers.*model\.attention=sdpa"):
        pretrained("nano", attention="xformers")


def test_a_gpu_only_attention_is_refused_on_the_device_of_the_run() -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    model = pretrained("nano")
    refuse_device(model.unet, torch.device("cpu"))
    model.unet.set_attn_processor(XFormersAttnProcessor())
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and this run is on cpu"):
        refuse_device(model.unet, torch.device("cpu"))


def test_switches_do_not_change_what_is_predicted() -> None:
    model = pretrained("nano", channels_last=True, gradient_checkpointing=True)
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.unet.is_gradient_checkpointing
    assert torch.allclose(predict(model), predict(pretrained("nano")), atol=1e-5)


def test_a_hub_id_is_read_from_the_local_cache_without_network(tmp_path: Path, monkeypatch) -> None:
    repository = tmp_path / "models--someone--nano"
    shutil.copytree(NANO, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(predict(pretrained("someone/nano")), predict(pretrained("nano")))
    with pytest.raises(UserError, match=r"model\.weights=someone/else: not found on this machine"):
        pretrained("someone/else")
