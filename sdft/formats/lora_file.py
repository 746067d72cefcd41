"""LoRA files: reads any layout into a `LoraFile`, writes the layouts of kohya and diffusers.

Knows the key suffixes and metadata of files. `adapter` knows models, `lora_keys` the names of layers.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from sdft.errors import UserError
from sdft.formats import lora_keys
from sdft.formats.adapter_metadata import ADAPTER_METADATA, adapter_metadata, alphas_from_metadata
from sdft.formats.lora_keys import BIAS, VECTORS
from sdft.formats.lora_layer import DORA, DOWN, ROTATIONS, TENSORS, UP, Layer, LoraFile, kohya_magnitude
from sdft.formats.output import atomic_output
from sdft.formats.rotation import BLOCKS
from sdft.formats.safetensors_io import read_header, refuse_nonfinite, tensor_info, write_tensors

Layout = Literal["kohya", "diffusers"]

ALPHA = "alpha"
SUFFIXES = {name: name for name in (*TENSORS, *VECTORS, ALPHA)} | {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_magnitude_vector": DORA,
    "lora_magnitude_vector.weight": DORA,
    # What diffusers' training scripts wrote formerly, and still write for the text encoders.
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
}
"""Key suffixes in files -> kohya's name of the tensor."""
OTHER_KINDS = {
    r"(^|\.)(bundle_emb|emb_params|string_to_param|string_to_token)(\.|$)": "embeddings of new words",
    r"\.diff(_b)?$": "whole weights (diff) of LyCORIS",
    r"\.(oft_diag|oft_R(\.\w+)*\.weight|oft_r|boft_\w+)$": "OFT or BOFT of peft, or of early LyCORIS",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.(on_input|ia3_l)$": "IA3",
    r"\.scale$": "scales",
}
"""Patterns of names -> what they are, of adapters that are not read."""
MAX_NAMED = 5
UNET_MODULES = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_emb", "add_emb")
"""Files of a UNet alone name its modules without `unet.`."""


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with these tensors is a LoRA or another adapter, of any kind and for any model."""
    return any(suffix not in (None, ALPHA) or _other_kind(module) for module, suffix in map(split_key, names))


def read_lora(path: Path, key: str, skip_unknown: bool = False) -> LoraFile:
    """The LoRA in a file of any known layout; the tensors are memory-mapped, except 8-bit floats, which become fp16.

    skip_unknown: warn of tensors that cannot be read instead of refusing the file.
    Raises UserError, which starts with `key`, and says what is wrong.
    """
    names, metadata = read_names(key, path)
    if not is_lora(names):
        raise UserError(f"{key}: {path.name} is not a LoRA; none of its {len(names)} tensors belongs to one")
    unknown = unknown_tensors(names, key, path)
    if unknown:
        problem = f"{key}: {path.name} has {len(unknown)} tensors that cannot be read: {_summary(unknown)}"
        if len(unknown) == len(names):
            raise UserError(problem)
        if not skip_unknown:
            raise UserError(f"{problem}. python -m sdft.formats skip_unknown=true writes a file of the others")
        warnings.warn(f"{problem}; they are left out", stacklevel=2)
    names = [name for name in names if name not in unknown]
    alphas = alphas_from_metadata(metadata, key)
    layers: dict[str, dict[str, Tensor]] = {}
    vectors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in names:
            module, suffix = split_key(name)
            assert suffix is not None  # unknown_tensors has those without
            if suffix in VECTORS:
                layer, _, tensor = (weight := lora_keys.vector_of(module, suffix)).rpartition(".")
                tensors, place = vectors, weight
            else:
                layer, tensor = lora_keys.layer_of(module), SUFFIXES[suffix]
                tensors, place = layers.setdefault(layer, {}), tensor
            if place in tensors:
                raise UserError(f"{key}: {path.name} has {tensor} of {layer} twice, once as {name}")
            value = file.get_tensor(name)
            value = value.to(torch.float16) if value.is_floating_point() and value.itemsize == 1 else value
            refuse_nonfinite(f"{key}: {path.name}", name, value)
            tensors[place] = value
    found, wrong = {}, [f"{name} has a change of {list(v.shape)}" for name, v in vectors.items() if not is_vector(v)]
    for name, tensors in layers.items():
        try:
            found[name] = _layer(name, tensors, alphas)
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        problems = "; ".join(wrong[:MAX_NAMED]) + "; ..." * (len(wrong) > MAX_NAMED)
        num = len(layers) + len(vectors)
        raise UserError(f"{key}: {path.name} is damaged in {len(wrong)} of its {num} layers: {problems}")
    kept = {name: value for name, value in metadata.items() if name not in (ADAPTER_METADATA, "format")}
    return LoraFile(found, kept, vectors)


def write_lora_file(
    lora: LoraFile,
    path: Path,
    layout: Layout,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA atomically.

    dtype: of the tensors; None keeps theirs. The alphas of a kohya file are fp32 if `dtype` cannot represent them, and
        changes of norms and biases keep their own: they are small, and fp16 rounds them off.
    metadata: more metadata of the file.
    Raises UserError if diffusers cannot represent one of the layers.
    """
    written, all_metadata = {}, dict(metadata or {})
    tensors = kohya_tensors if layout == "kohya" else diffusers_tensors
    for name, tensor in tensors(lora, dtype):
        written[name] = tensor.detach().cpu().contiguous()
    if layout == "diffusers":
        all_metadata[ADAPTER_METADATA] = json.dumps(adapter_metadata(lora), indent=2, sort_keys=True)
    save_atomically(written, path, all_metadata)


def kohya_tensors(lora: LoraFile, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a kohya file."""
    for name, layer in lora.layers.items():
        kohya, alpha = lora_keys.kohya_name(name), torch.tensor(layer.alpha)
        for suffix, tensor in layer.tensors.items():
            yield f"{kohya}.{suffix}", tensor.to(dtype or tensor.dtype)
        narrow = alpha.to(dtype or next(iter(layer.tensors.values())).dtype)
        yield f"{kohya}.{ALPHA}", narrow if narrow == alpha else alpha
    for weight, change in lora.vectors.items():
        yield lora_keys.vector_key(weight), change


def diffusers_tensors(lora: LoraFile, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a diffusers file: peft's keys prefixed by the part."""
    if without := lora.not_in_diffusers:
        found = {lora.layers[name].kind if name in lora.layers else "trained norms and biases" for name in without}
        kinds = " and ".join(sorted(found))
        raise UserError(f"diffusers cannot represent {kinds} ({without[0]}); write the kohya layout")
    for part in lora_keys.PARTS:
        layers = lora.of_part(part)
        if len({layer.kind == "dora" for layer in layers.values()}) > 1:
            raise UserError(f"diffusers cannot represent {part} with DoRA in only some layers; write the kohya layout")
        for module, layer in layers.items():
            for name, tensor in layer.peft_tensors.items():
                # As peft writes them; but transformers 5 loads a text encoder's magnitudes only by their full name.
                weight = "" if name == "lora_magnitude_vector" and part == "unet" else ".weight"
                yield f"{part}.{module}.{name}{weight}", tensor.to(dtype or tensor.dtype)


def save_atomically(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: after a crash, the path has its former content, or none."""
    entries = {name: tensor_info(tensor) for name, tensor in tensors.items()}
    with atomic_output(path, overwrite=True) as written:
        write_tensors(written, entries, {"format": "pt", **metadata}, tensors.__getitem__)


def read_names(key: str, path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors in a file, and its metadata."""
    stored, metadata = read_header(key, path)
    return [tensor.name for tensor in stored], metadata


def split_key(name: str) -> tuple[str, str | None]:
    """The module and the suffix of a tensor's key; the suffix is None if it is not a LoRA's."""
    # As peft saves an adapter of its own name: base_model.model.X.lora_A.default.weight.
    name = re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$)\w+(\.weight|$)", r".\1\2", name)
    name = name.removeprefix("base_model.model.")
    if name.startswith(UNET_MODULES):
        name = f"unet.{name}"
    # Until mid-2023, diffusers kept LoRAs in the attention processors.
    name = re.sub(r"\.processor\.(\w+)_lora\.", r".\1.lora.", name).replace(".to_out.lora.", ".to_out.0.lora.")
    for suffix in SUFFIXES:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    return name, None


def unknown_tensors(names: Sequence[str], key: str, path: Path) -> dict[str, str]:
    """Tensors that belong to no layer of SDXL's LoRAs -> what they are. Raises UserError for LoRAs of other models."""
    unknown, weights = {}, set()
    whole = {split_key(name)[0] for name in names if name.endswith(".diff")}
    for name in names:
        module, suffix = split_key(name)
        if suffix in VECTORS and _is_known_vector(module, suffix, whole):
            continue
        if kind := _other_kind(name):
            unknown[name] = kind
            continue
        if model := lora_keys.other_model(name):
            raise UserError(f"{key}: {path.name} is a LoRA for {model} ({name}); it does not fit SDXL")
        try:
            layer = lora_keys.layer_of(module)
        except KeyError:
            unknown[name] = "layers that SDXL does not have"
            continue
        if suffix is None or suffix in VECTORS:
            unknown[name] = "tensors of an unknown kind"
        elif suffix != ALPHA:
            weights.add(layer)
    for name in names:
        module, suffix = split_key(name)
        if name not in unknown and suffix == ALPHA and lora_keys.layer_of(module) not in weights:
            unknown[name] = "alphas without weights"
    return unknown


def _is_known_vector(module: str, suffix: str, whole: Collection[str]) -> bool:
    """Whether a tensor is the change of a norm or of a bias, and not of a bias whose weight is one of `whole`."""
    try:
        weight = lora_keys.vector_of(module, suffix)
    except KeyError:
        return False
    return suffix != BIAS or module not in whole or lora_keys.vector_key(weight).endswith(".b_norm")


def is_vector(change: Tensor) -> bool:
    return change.dim() == 1 and change.is_floating_point()


def _other_kind(name: str) -> str | None:
    return next((kind for pattern, kind in OTHER_KINDS.items() if re.search(pattern, name)), None)


def _summary(unknown: Mapping[str, str]) -> str:
    """How many tensors there are of each kind, with the first ones of it."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in unknown.items():
        by_kind.setdefault(kind, []).append(name)
    return "; ".join(
        f"{len(found)} {kind} ({', '.join(sorted(found)[:MAX_NAMED])}{', ...' * (len(found) > MAX_NAMED)})"
        for kind, found in by_kind.items()
    )


def _layer(name: str, tensors: dict[str, Tensor], alphas: Callable[[str, int | None], float]) -> Layer:
    """A layer from a file's tensors, checked, in kohya's shapes."""
    # LyCORIS writes the constraint of a rotation as an integer if it was given as one.
    if wrong := [name for name, tensor in tensors.items() if not tensor.is_floating_point() and name != ALPHA]:
        raise ValueError(f"has {wrong[0]} of {tensors[wrong[0]].dtype}, and must have floats")
    alpha = tensors.pop(ALPHA, None)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"has an alpha of {alpha.numel()} numbers")
    # Some programs write linear layers as 1x1 convolutions.
    if not lora_keys.is_convolution(name):
        tensors = {suffix: t.flatten(1) if t.dim() == 4 and suffix != BLOCKS else t for suffix, t in tensors.items()}
    if DORA in tensors and DOWN in tensors:
        if tensors[DORA].dim() == 2 and len(tensors[DORA]) == 1 and UP in tensors and len(tensors[UP]) > 1:
            raise ValueError("is a DoRA with norms of columns (dora_scale [1, in]), and norms of rows can be read")
        tensors[DORA] = kohya_magnitude(tensors[DORA], tensors[DOWN])
    layer = Layer(tensors, 0.0 if alpha is None else float(alpha))
    layer.delta_shape  # noqa: B018  raises ValueError if the tensors do not fit together
    return layer if alpha is not None or layer.kind in ROTATIONS else Layer(tensors, alphas(name, layer.rank))
