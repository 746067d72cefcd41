"""SDXL from where it lies: shipped nano, a hub id, a diffusers folder or one single-file checkpoint.

The only concept that may use `formats`. Weights are read into empty networks, each straight into the dtype in which it
will run, so no second copy of them is ever held.
"""

from __future__ import annotations

import json
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
from sdft.formats.model_checkpoint import INDEX, PICKLES, Checkpoint, open_checkpoint, open_vae
from sdft.models.attention import Attention, set_attention
from sdft.models.nano import WEIGHTS as NANO
from sdft.models.sdxl import SDXL, EmptyPrompt
from sdft.types import DTYPES, Count

# Their bars count files, not bytes; `train.py` says what is being loaded.
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


def pretrained(
    weights: str,
    config: str = "nano",
    vae: str | None = None,
    dtype: Mapping[Part, Dtype] | None = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    prompt_chunks: Count = 1,
    empty_prompt: EmptyPrompt | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> SDXL:
    """The model with the given weights.

    weights: `nano` (shipped), a hub id, a diffusers folder, or a single-file checkpoint (`.safetensors`).
    config: `nano`, a folder or a hub id that has the configs and tokenizers which a single file lacks.
    vae: a folder, file or hub id whose VAE replaces the model's own.
    dtype: of each part's frozen weights, fp32 where not said; what learns must be fp32.
    attention: how the UNet computes attention: `sdpa` (torch), `xformers` (needs its extra and a GPU), `eager`
        (plain matrix products), `sliced` (least memory, slow).
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
    channels_last: the UNet's convolutions in the memory order that tensor cores like.
    compile: the UNet through torch.compile: faster steps after a slow first one.
    prompt_chunks: captions are read in so many chunks of 75 tokens; what is beyond is cut off, and said.
    empty_prompt: what a dropped caption becomes: `zeros` or the encoded `empty` string; none is what the weights say.
    variant: of a folder's or hub id's weight files, such as `fp16`.
    allow_pickle: also open `.ckpt` files, which can run code where torch's restricted reader has a hole.
    """
    checkpoint = find_checkpoint(weights, variant, allow_pickle)
    folder = checkpoint.root if checkpoint.is_folder else find_folder("model.config", config, CONFIGS)
    dtypes = {part: torch.float32 for part in PARTS} | {part: DTYPES[said] for part, said in (dtype or {}).items()}
    configs = {part: folder / part for part in PARTS if vae is None or part != "vae"}
    networks = load_networks(f"model.weights={weights}", checkpoint, configs, dtypes)
    if vae is not None:
        networks["vae"] = load_vae(vae, folder / "vae", dtypes["vae"])
    model = SDXL(
        **networks,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        empty_prompt=empty_prompt or recorded_empty_prompt(folder),
        prompt_chunks=prompt_chunks,
    )
    if not checkpoint.is_folder:
        model.set_prediction_type(checkpoint.prediction or "epsilon", checkpoint.zero_terminal_snr)
    set_attention(model.unet, attention)
    if gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if channels_last:
        model.unet.to(memory_format=torch.channels_last)
    if compile:
        model.unet.compile()
    return model


def pretrained_on_meta(
    weights: str,
    config: str = "nano",
    dtype: Mapping[Part, Dtype] | None = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    prompt_chunks: Count = 1,
    empty_prompt: EmptyPrompt | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    **_: Any,
) -> SDXL:
    """What `pretrained` would load, its weights on the meta device: nothing but configs and headers is read.

    Of a hub id only the configs are fetched, and none of SDXL's own. Where tokenizers are missing, nano's stand in.
    """
    local = Path(os.path.expanduser(weights))
    is_file = local.suffix in (".safetensors", *PICKLES)
    source = config if is_file else weights
    folder = SDXL_BASE if source == SDXL_ID else find_folder("model.weights", source, CONFIGS)
    networks = {part: empty_network(part, folder / part) for part in PARTS}
    if is_file or local.is_dir():
        checkpoint = open_checkpoint("model.weights", local, allow_pickle, variant)
        refuse_misfit(f"model.weights={weights}", checkpoint, networks)
    for part, said in (dtype or {}).items():
        networks[part].to(DTYPES[said])
    words = folder if (folder / "tokenizer").is_dir() else NANO
    model = SDXL(
        **networks,
        tokenizer=CLIPTokenizer.from_pretrained(words / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(words / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        empty_prompt=empty_prompt or recorded_empty_prompt(folder),
        prompt_chunks=prompt_chunks,
    )
    # xformers keeps what sdpa keeps, and need not be installed where a run is only described.
    set_attention(model.unet, "sdpa" if attention == "xformers" else attention)
    if gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model


def find_checkpoint(weights: str, variant: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """The headers of the weights, downloaded where a hub id asks for it."""
    if Path(weights).suffix in (".safetensors", *PICKLES):
        source = Path(os.path.expanduser(weights))
    else:
        kind = f".{variant}" if variant else ""
        patterns = (*CONFIGS, *(f"{part}/*{kind}*.safetensors" for part in PARTS))
        source = find_folder("model.weights", weights, patterns, () if variant else VARIANTS)
    return open_checkpoint("model.weights", source, allow_pickle, variant)


def find_folder(key: str, name: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of `nano`, of a path, or of a hub id: from the local cache of the Hub, or downloaded into it."""
    if name == "nano":
        return NANO
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=[*OTHER_FORMATS, *ignored]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{key}={name}: not found on this machine, and the hub cannot be reached or does not have it "
            f"({first_line(error)}); pass {key}=FOLDER or {key}=FILE.safetensors, or connect once so that it is cached"
        ) from error


def load_networks(
    where: str, checkpoint: Checkpoint, configs: Mapping[str, Path], dtypes: Mapping[str, torch.dtype]
) -> dict[str, nn.Module]:
    """The parts that `configs` describes, with the checkpoint's weights; all of them fit, or none is read."""
    networks = {part: empty_network(part, config) for part, config in configs.items()}
    refuse_misfit(where, checkpoint, networks)
    with checkpoint.opened() as read:
        for part, network in networks.items():
            # Weights that have the right dtype already stay in the mapped file.
            state = {
                name: read(weight).to(dtypes[part]).contiguous()
                for weight, name in parameter_names(part, network).items()
            }
            network.load_state_dict(state, strict=False, assign=True)
    return networks


def load_vae(source: str, config: Path, dtype: torch.dtype) -> nn.Module:
    """A VAE of its own: a folder, a hub id, or a file; `config` describes what is in a file."""
    path = Path(os.path.expanduser(source))
    if path.suffix not in (".safetensors", *PICKLES):
        path = find_folder("model.vae", source, ("*.json", "*.safetensors"), VARIANTS)
        config = path if (path / "config.json").is_file() else path / "vae"
    checkpoint = open_vae("model.vae", path)
    return load_networks(f"model.vae={source}", checkpoint, {"vae": config}, {"vae": dtype})["vae"]


def recorded_empty_prompt(folder: Path) -> EmptyPrompt:
    """What the model's own index says of empty prompts; SDXL's way where it does not say."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return (str(error).strip() or repr(error)).splitlines()[0]
