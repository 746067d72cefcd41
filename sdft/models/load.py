"""Loads SDXL: the shipped nano, a Hub id, a diffusers folder or a single-file checkpoint.

Weights are read into empty networks, each straight into the dtype in which it runs, so that memory never holds a second
copy of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import EulerDiscreteScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import CLIPTokenizer

from sdft.errors import UserError
from sdft.formats.architecture import PARTS, empty_network, parameter_names, refuse_misfit
from sdft.formats.baked import BakedLora, LoraOption, baked, open_loras, refuse_unfit
from sdft.formats.json_file import read_json
from sdft.formats.model_checkpoint import INDEX, PICKLES, Checkpoint, open_checkpoint, open_vae
from sdft.formats.safetensors_io import refuse_nonfinite
from sdft.models.attention import Attention, set_attention
from sdft.models.nano import WEIGHTS as NANO
from sdft.models.quantized import Format, quantize, quantize_layers
from sdft.models.sdxl import SDXL, TILE, EmptyPrompt
from sdft.models.streaming import stream_blocks
from sdft.types import DTYPES, Count, OffloadedBlocks

# Their bars count files, not bytes.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_BASE = Path(__file__).parent / "sdxl_base"
"""SDXL's configs, without weights and tokenizers."""
CONFIGS = ("model_index.json", "*/*.json", "tokenizer*/*.txt")
OTHER_FORMATS = ("*flax*", "*openvino*", "*onnx*")
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
Dtype = Literal["fp32", "bf16", "fp16"]
Compiled = Literal["blocks", "full"]


def pretrained(
    weights: str,
    config: str = "nano",
    vae: str | None = None,
    dtype: Mapping[Part, Dtype] | None = None,
    quantization: Mapping[Part, Format] | None = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compile: bool | Compiled = False,
    prompt_chunks: Count = 1,
    empty_prompt: EmptyPrompt | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    offload_idle: bool = False,
    offload_blocks: OffloadedBlocks = 0,
    tiled_vae: bool = False,
    loras: Sequence[LoraOption] = (),
    merge_recipe: str | None = None,
    family: type[SDXL] = SDXL,
) -> SDXL:
    """SDXL with the given weights.

    weights: `nano` (shipped), a Hub id, a diffusers folder, or a single-file checkpoint (`.safetensors`).
    loras: LoRAs that are baked into the weights, in fp32 and before `dtype` and `quantization`: {lora: FILE or run
        folder, scale: 1.0} each. The base of whatever trains has them.
    merge_recipe: a recipe of `python -m sdft.merging`, whose result a command has put in the place of `weights` before
        it calls this (`sdft.merging.run.start_from_merge`).
    config: `nano`, a folder or a Hub id with the configs and tokenizers that a single file lacks.
    vae: a folder, file or Hub id whose VAE replaces the model's own.
    dtype: part -> dtype of its weights, fp32 by default. Trainable weights are fp32, or bf16 with stochastic rounding.
    quantization: part -> `int8`, `fp8` or `nf4` (4 bits), in which the linear layers of a frozen part's blocks are held
        (`sdft.models.quantized`); its other weights have its dtype.
    attention: how the UNet computes attention: `sdpa` (torch), `xformers` (needs its extra and a GPU), `eager`
        (plain matrix products), `sliced` (least memory, slow).
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
    channels_last: memory format of the UNet's convolutions, faster on tensor cores.
    compile: run the UNet through torch.compile: faster steps after a slow first one. `blocks` compiles its transformer
        blocks, one kind once for all of them, which takes a fraction of the time of `full` (or true), all of it.
    prompt_chunks: number of 75-token chunks of a prompt that are read; tokens beyond them are cut off with a warning.
    empty_prompt: what a dropped caption becomes: `zeros` or the encoded `empty` string; if None, as in the model's
        index.
    variant: of the weight files of a folder or Hub id, such as `fp16`.
    allow_pickle: also open `.ckpt` files; a pickle can run code if torch's restricted unpickler has a hole.
    offload_idle: the other parts wait on the CPU while the VAE encodes or decodes: for small GPUs. Moving them takes a
        second or two for each batch of decoded images.
    offload_blocks: number of transformer blocks of the UNet, or `all`, that wait on the host (`sdft.models.streaming`).
    tiled_vae: decode images in overlapping tiles of 448 px: a third of the memory, and seams that are hard to see.
    family: the class that is built, for loaders of subclasses.

    Raises UserError where weights are missing, do not fit, or the attention is not available.
    """
    if merge_recipe is not None:
        by_hand = f"write it with python -m sdft.merging merge=recipe file={merge_recipe} out=FILE, and pass that file"
        raise UserError(f"model.merge_recipe={merge_recipe}: this command does not merge; {by_hand}")
    opened = open_loras(loras)
    open_baked = functools.partial(find_baked, weights, opened, variant, allow_pickle)
    checkpoint = open_baked()
    folder = checkpoint.root if checkpoint.is_folder else find_folder("model.config", config, CONFIGS)
    dtypes, quantized = part_dtypes(dtype), quantized_parts(quantization, family)
    configs = {part: folder / part for part in PARTS if vae is None or part != "vae"}
    networks = load_networks(f"model.weights={weights}", checkpoint, configs, dtypes, quantized)
    if vae is not None:
        networks["vae"] = load_vae(vae, folder / "vae", dtypes["vae"])
    model = assemble(networks, folder, folder, family, prompt_chunks, empty_prompt, offload_idle, tiled_vae)
    if quantized:
        model.original_weights = open_baked
    model.baked = [one.described() for one in opened]
    if not checkpoint.is_folder or checkpoint.told is not None:
        model.set_prediction_type(checkpoint.prediction or "epsilon", checkpoint.zero_terminal_snr)
    set_up(model.unet, attention, gradient_checkpointing, offload_blocks, channels_last, compile)
    return model


def assemble(
    networks: Mapping[str, nn.Module],
    folder: Path,
    tokenizers: Path,
    family: type[SDXL],
    prompt_chunks: int,
    empty_prompt: EmptyPrompt | None,
    offload_idle: bool,
    tiled_vae: bool,
) -> SDXL:
    """The model of these networks, with the scheduler of a folder and the tokenizers of another."""
    model = family(
        **networks,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        empty_prompt=empty_prompt or recorded_empty_prompt(folder),
        prompt_chunks=prompt_chunks,
    )
    model.offload_idle, model.decoded_tile = offload_idle, TILE if tiled_vae else None
    return model


def set_up(
    unet: nn.Module,
    attention: Attention,
    gradient_checkpointing: bool,
    offload_blocks: OffloadedBlocks,
    channels_last: bool = False,
    compile: bool | Compiled = False,
) -> None:
    """Set how the UNet computes, as `pretrained` describes."""
    set_attention(unet, attention)
    if offload_blocks:
        if not gradient_checkpointing or compile:
            remedy = "set model.gradient_checkpointing=true and model.compile=false, or model.offload_blocks=0"
            raise UserError(f"model.offload_blocks={offload_blocks}: needs checkpoints, and no compilation; {remedy}")
        stream_blocks(unet, offload_blocks)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compile == "blocks":
        unet.compile_repeated_blocks()
    elif compile:
        unet.compile()


def pretrained_on_meta(
    weights: str,
    config: str = "nano",
    dtype: Mapping[Part, Dtype] | None = None,
    quantization: Mapping[Part, Format] | None = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    prompt_chunks: Count = 1,
    empty_prompt: EmptyPrompt | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    offload_idle: bool = False,
    offload_blocks: OffloadedBlocks = 0,
    tiled_vae: bool = False,
    loras: Sequence[LoraOption] = (),
    family: type[SDXL] = SDXL,
    **_: Any,
) -> SDXL:
    """The model that `pretrained` would load, on the meta device: only configs and headers are read.

    Of a Hub id only the configs are downloaded, except SDXL's own, which are shipped. nano's tokenizers replace missing
    ones.
    """
    local = Path(os.path.expanduser(weights))
    is_file = local.suffix in (".safetensors", *PICKLES)
    source = config if is_file else weights
    folder = SDXL_BASE if source == SDXL_ID else find_folder("model.weights", source, CONFIGS)
    networks = {part: empty_network(part, folder / part) for part in PARTS}
    shapes = {
        weight: tuple(network.get_parameter(name).shape)
        for part, network in networks.items()
        for weight, name in parameter_names(part, network).items()
    }
    for one in open_loras(loras):
        refuse_unfit(one, shapes)
    if is_file or local.is_dir():
        checkpoint = open_checkpoint("model.weights", local, allow_pickle, variant)
        refuse_misfit(f"model.weights={weights}", checkpoint, networks)
    for part, kind in part_dtypes(dtype).items():
        networks[part].to(kind)
    for part, (format, suffixes) in quantized_parts(quantization, family).items():
        quantize_layers(networks[part], suffixes, format)
    tokenizers = folder if (folder / "tokenizer").is_dir() else NANO
    model = assemble(networks, folder, tokenizers, family, prompt_chunks, empty_prompt, offload_idle, tiled_vae)
    # xformers keeps the same activations as sdpa, and need not be installed for a forecast.
    set_up(model.unet, "sdpa" if attention == "xformers" else attention, gradient_checkpointing, offload_blocks)
    return model


ON_META = {pretrained: pretrained_on_meta}
"""Loader -> its counterpart that reads no weights, for `dry_run`. A new family adds its own."""


def find_checkpoint(weights: str, variant: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """The headers of the weights, which are downloaded if `weights` is a Hub id."""
    if Path(weights).suffix in (".safetensors", *PICKLES):
        source = Path(os.path.expanduser(weights))
    else:
        kind = f".{variant}" if variant else ""
        patterns = (*CONFIGS, *(f"{part}/*{kind}*.safetensors" for part in PARTS))
        source = find_folder("model.weights", weights, patterns, () if variant else VARIANTS)
    return open_checkpoint("model.weights", source, allow_pickle, variant)


def find_baked(
    weights: str, loras: Sequence[BakedLora], variant: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """The same, read with LoRAs baked in."""
    return baked(find_checkpoint(weights, variant, allow_pickle), loras)


def find_folder(key: str, name: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of `nano`, a path, or a Hub id (from the local Hub cache, or downloaded into it)."""
    if name == "nano":
        return NANO
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=[*OTHER_FORMATS, *ignored]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{key}={name}: not found on this machine, and the Hub cannot be reached or does not have it "
            f"({first_line(error)}); pass {key}=FOLDER or {key}=FILE.safetensors, or connect once so that it is cached"
        ) from error


def part_dtypes(dtype: Mapping[Part, Dtype] | None) -> dict[str, torch.dtype]:
    """Part -> dtype of its weights."""
    return {part: torch.float32 for part in PARTS} | {part: DTYPES[name] for part, name in (dtype or {}).items()}


def quantized_parts(
    quantization: Mapping[Part, Format] | None, family: type[SDXL]
) -> dict[str, tuple[Format, Sequence[str]]]:
    """Part -> (format, suffixes of the layers) of the parts that are quantised. Raises UserError for the VAE."""
    quantized: dict[str, tuple[Format, Sequence[str]]] = {}
    for part, name in (quantization or {}).items():
        if part not in family.ADAPTER_LAYERS:
            raise UserError(f"model.quantization.{part}={name}: it has no linear layers to quantise; leave it out")
        quantized[part] = (name, family.ADAPTER_LAYERS[part]["all"])
    return quantized


def load_networks(
    where: str,
    checkpoint: Checkpoint,
    configs: Mapping[str, Path],
    dtypes: Mapping[str, torch.dtype],
    quantized: Mapping[str, tuple[Format, Sequence[str]]] | None = None,
) -> dict[str, nn.Module]:
    """The networks of `configs` with the checkpoint's weights. Raises UserError before reading if any does not fit.

    quantized: part -> (format, suffixes of its layers that are quantised). One weight at a time is held in full.
    """
    networks = {part: empty_network(part, config) for part, config in configs.items()}
    refuse_misfit(where, checkpoint, networks)
    with checkpoint.opened() as read:
        for part, network in networks.items():
            names = parameter_names(part, network)
            format, suffixes = (quantized or {}).get(part, ("int8", ()))
            layers = quantize_layers(network, suffixes, format)
            # Weights that have the dtype already stay memory-mapped.
            state = {}
            for weight, name in names.items():
                tensor, layer = read(weight), name.rpartition(".")[0]
                refuse_nonfinite(where, weight, tensor)
                if layer in layers and name.endswith(".weight"):
                    state[f"{layer}.codes"], state[f"{layer}.scales"] = quantize(tensor, format)
                else:
                    state[name] = tensor.to(dtypes[part]).contiguous()
            network.load_state_dict(state, strict=False, assign=True)
    return networks


def load_vae(source: str, config: Path, dtype: torch.dtype) -> nn.Module:
    """A separate VAE: a folder, a Hub id, or a file that `config` describes."""
    path = Path(os.path.expanduser(source))
    if path.suffix not in (".safetensors", *PICKLES):
        path = find_folder("model.vae", source, ("*.json", "*.safetensors"), VARIANTS)
        config = path if (path / "config.json").is_file() else path / "vae"
    checkpoint = open_vae("model.vae", path)
    return load_networks(f"model.vae={source}", checkpoint, {"vae": config}, {"vae": dtype})["vae"]


def recorded_empty_prompt(folder: Path) -> EmptyPrompt:
    """`force_zeros_for_empty_prompt` of the model's index; zeros by default, as in SDXL."""
    index = read_json(folder / INDEX)
    return "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]
