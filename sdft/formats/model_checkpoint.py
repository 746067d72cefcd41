"""Reads model checkpoints of any format: all weights under the key names of diffusers.

Knows the three formats (diffusers folder, single file, pickled single file) and their key names. Opening a checkpoint
reads headers only; weights are read one by one.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.json_file import read_json
from sdft.formats.keys import PREFIXES, KeyMapping, hub_name, mapping_for_single_key
from sdft.formats.metadata import stated_prediction
from sdft.formats.other_architectures import refuse_other_architecture
from sdft.formats.safetensors_io import DTYPE_NAMES, DTYPES, StoredTensor, TensorInfo, read_header

INDEX = "model_index.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
IGNORED_TENSORS = ("position_ids", "denoiser.sigmas", "v_pred", "ztsnr")
"""Tensors, or last parts of their names, that are not weights: buffers and markers."""
EXTRAS = re.compile(
    r"model_ema\..*|(model\.)?(betas|log_betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar)"
    r"|conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?|first_stage_model\.loss\..*"
    r"|(global_step|epoch|iteration|optimizer_states|lr_schedulers|callbacks|state_dict)(\..*)?"
)
"""What trainers and other programs leave in checkpoints beside the weights: averages, noise schedules, a projection of
the first text encoder that SDXL does not use, the loss of the VAE. It is left out."""
MAPPED_BYTES = 2**28
"""Read from a file before it is mapped anew."""
ALIKE = re.compile(r"\.(?:transformer_blocks|layers)\.(\d+)\.")
"""Modules that are numbered from 0 without a gap, all with the same weights."""
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
LOGIT_SCALE_KEY = "logit_scale"
"""In the metadata of a folder's second text encoder: dtype and value of a tensor that diffusers does not have."""


@dataclass(frozen=True)
class WeightView(TensorInfo):
    """One weight: the stored tensor that contains it, and how to extract it."""

    stored: StoredTensor
    place: KeyMapping | None = None
    """For single files: how the stored tensor maps to weights."""
    index: int = 0
    """Which of the weights of the stored tensor."""


class Predicts(NamedTuple):
    """What a model predicts, and on which noise schedule."""

    type: str
    """`epsilon` or `v_prediction`."""
    zero_terminal_snr: bool = False

    def __str__(self) -> str:
        return f"{self.type} with zero terminal SNR" if self.zero_terminal_snr else self.type


@dataclass
class Checkpoint:
    """The weights of the model at `root`, by `part/name`."""

    root: Path
    weights: dict[str, WeightView]
    unknown: list[str]
    """Tensors that SDXL does not have."""
    metadata: dict[str, str]
    marks: frozenset[str] = frozenset()
    """The empty tensors `v_pred` and `ztsnr`, if the file has them."""
    num_vae_levels: int = 4
    scale: StoredTensor | None = None
    """CLIP's `logit_scale` in single files; images do not depend on it."""
    pickled: dict[str, Tensor] = field(default_factory=dict, repr=False)
    told: Predicts | None = None
    """What the model predicts, where that is decided rather than read, as in a merge."""

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @property
    def folder(self) -> Path:
        """The folder that file names are relative to."""
        return self.root if self.is_folder else self.root.parent

    @property
    def files(self) -> list[Path]:
        """The files with its weights."""
        return sorted({view.stored.file for view in self.weights.values()})

    @property
    def num_bytes(self) -> int:
        return sum(view.num_bytes for view in self.weights.values())

    @property
    def prediction(self) -> str | None:
        """The prediction type, `epsilon` or `v_prediction`; None if the checkpoint does not state it."""
        if self.told is not None:
            return self.told.type
        if self.is_folder:
            return scheduler_config(self.root).get("prediction_type", "epsilon")
        return "v_prediction" if "v_pred" in self.marks else stated_prediction(self.metadata)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule has zero terminal SNR."""
        if self.told is not None:
            return self.told.zero_terminal_snr
        if self.is_folder:
            return bool(scheduler_config(self.root).get("rescale_betas_zero_snr"))
        return "ztsnr" in self.marks

    @property
    def predicts(self) -> Predicts:
        """What it predicts; epsilon if it does not say."""
        return Predicts(self.prediction or "epsilon", self.zero_terminal_snr)

    def logit_scale(self) -> Tensor | None:
        """CLIP's `logit_scale`, or None if the checkpoint lacks it."""
        if self.scale is not None:
            return read_stored(self.scale, self.pickled)
        code, _, value = self.metadata.get(LOGIT_SCALE_KEY, "").partition(":")
        return torch.tensor(float(value), dtype=DTYPES[code]) if code else None

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads one weight, without a copy where no conversion is needed.

        Pages of a file count as memory of the process as long as it is mapped. It is mapped anew again and again, so
        that those of weights that were copied or dropped do not add up to the whole file.
        """
        file: Path | None = None
        mapped: Any = None
        num_bytes = 0

        def tensor(stored: StoredTensor) -> Tensor:
            nonlocal file, mapped, num_bytes
            if self.pickled:
                return self.pickled[stored.name]
            if stored.file != file or num_bytes > MAPPED_BYTES:
                file, mapped, num_bytes = stored.file, safe_open(stored.file, framework="pt"), 0
            num_bytes += stored.num_bytes
            return mapped.get_tensor(stored.name)

        yield lambda weight: self.read(weight, tensor)

    def read(self, weight: str, tensor: Callable[[StoredTensor], Tensor]) -> Tensor:
        """One weight; `tensor` reads a stored tensor."""
        view = self.weights[weight]
        return view.place.to_folder(tensor(view.stored), view.index) if view.place else tensor(view.stored)


def read_stored(stored: StoredTensor, pickled: dict[str, Tensor]) -> Tensor:
    """One small tensor."""
    if pickled:
        return pickled[stored.name]
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name)


def open_checkpoint(key: str, source: str | Path, allow_pickle: bool = False, variant: str | None = None) -> Checkpoint:
    """Opens the model at `source`, reading headers only. Raises UserError, which starts with `key=source`.

    allow_pickle: also read `.ckpt` files, by `torch.load(weights_only=True)`.
    variant: of the files in a folder, such as fp16.
    """
    root, where = Path(os.path.expanduser(source)), f"{key}={source}"
    if root.is_dir():
        return _folder(where, root, variant)
    if not root.is_file():
        raise UserError(f"{where}: there is no such file or folder")
    if root.suffix in PICKLES:
        if not allow_pickle:
            safe = root.with_suffix(".safetensors").name
            raise UserError(
                f"{where}: a pickle can run code; if you trust it, convert it once: "
                f"python -m sdft.formats in={source} out={safe} to=single_file allow_pickle=true"
            )
        return _pickle(where, root)
    if root.suffix != ".safetensors":
        raise UserError(f"{where}: is neither a folder nor a .safetensors file")
    stored, metadata = read_header(where, root)
    return _single_file(where, root, stored, metadata)


def open_vae(key: str, path: Path) -> Checkpoint:
    """The VAE from a VAE folder, a model folder, a VAE file with either key names, or a single-file checkpoint."""
    where = f"{key}={path}"
    if (path / INDEX).is_file():
        return open_checkpoint(key, path)
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder")
    files = part_files(where, path) if path.is_dir() else [path]
    stored = [tensor for file in files for tensor in read_header(where, file)[0]]
    prefix, names = PREFIXES["vae"], [tensor.name for tensor in stored]
    whole = any(name.startswith(prefix) for name in names)
    weights, unknown, levels = {}, [], _count_vae_levels(names)
    for tensor in stored:
        try:
            if any(".down_blocks." in name for name in names):
                weights[f"vae/{_current_name('vae', tensor.name)}"] = WeightView(tensor.dtype, tensor.shape, tensor)
            elif not whole or tensor.name.startswith(prefix):
                place = mapping_for_single_key(tensor.name if whole else prefix + tensor.name, levels)
                weights[place.weights[0]] = WeightView(tensor.dtype, place.folder_shape(tensor.shape), tensor, place)
        except KeyError:
            unknown.append(tensor.name)
    checkpoint = Checkpoint(path, weights, unknown, {}, num_vae_levels=levels)
    refuse_quantized(where, checkpoint)
    return checkpoint


def scheduler_config(folder: Path) -> dict:
    """The scheduler config of a folder; empty if there is none."""
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}


def _folder(where: str, root: Path, variant: str | None) -> Checkpoint:
    if not (root / INDEX).is_file():
        run = f"; pass {root / 'model'}" if (root / "model" / INDEX).is_file() else ""
        raise UserError(f"{where}: the folder has no {INDEX}, so it is not a diffusers model{run}")
    index = read_json(root / INDEX, f"{where}: {INDEX}")
    if "StableDiffusionXL" not in str(index.get("_class_name")):
        raise UserError(f"{where}: is a {index.get('_class_name')}, not Stable Diffusion XL")
    checkpoint = Checkpoint(root, {}, [], {})
    for part in PREFIXES:
        files = part_files(where, root / part, variant)
        refuse_missing_shards(where, files)
        for file in files:
            stored, metadata = read_header(where, file)
            checkpoint.metadata |= metadata
            for tensor in stored:
                if tensor.name.rpartition(".")[2] in IGNORED_TENSORS:
                    continue
                weight = f"{part}/{_current_name(part, tensor.name)}"
                if weight in checkpoint.weights:
                    first = checkpoint.weights[weight].stored.file.name
                    raise UserError(f"{where}: {weight} is in {first} and in {file.name}; remove one of them")
                checkpoint.weights[weight] = WeightView(tensor.dtype, tensor.shape, tensor)
    checkpoint.num_vae_levels = _count_vae_levels(checkpoint.weights)
    refuse_quantized(where, checkpoint)
    return checkpoint


def refuse_missing_shards(where: str, files: Sequence[Path]) -> None:
    """Raise UserError if one of the shards of a part is missing: `...-00001-of-00002.safetensors`, or in the index."""
    expected = set()
    for file in files:
        if match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", file.name):
            count = int(match[2])
            expected |= {f"{match[1]}-{number:05}-of-{match[2]}.safetensors" for number in range(1, count + 1)}
    missing = sorted(expected - {file.name for file in files})
    if missing:
        part, named = files[0].parent.name, ", ".join(missing[:5])
        raise UserError(f"{where}: {part} lacks {named}, so its weights are incomplete; get it again")


def refuse_incomplete(where: str, checkpoint: Checkpoint) -> None:
    """Raise UserError if a checkpoint lacks a part, or a layer that its neighbours have.

    For readers that have no config to compare all names and shapes with (`architecture.refuse_misfit`).
    """
    names = set(checkpoint.weights)
    without = [part for part in PREFIXES if not any(name.startswith(f"{part}/") for name in names)]
    if without:
        named = " and no ".join(part.replace("vae", "VAE").replace("unet", "UNet") for part in without)
        raise UserError(f"{where}: has no {named}; pass a checkpoint with all parts of SDXL")
    leaves: dict[str, dict[int, set[str]]] = {}
    for name in names:
        for match in ALIKE.finditer(name):
            blocks = leaves.setdefault(name[: match.start(1)], {})
            blocks.setdefault(int(match[1]), set()).add(name[match.end() :])
    missing = []
    for prefix, blocks in leaves.items():
        if 2 * len(blocks) > max(blocks) + 1:  # an excerpt of a few layers is another thing
            missing += [f"{prefix}{number}" for number in range(max(blocks)) if number not in blocks]
        count = Counter(leaf for own in blocks.values() for leaf in own)
        every = {leaf for leaf, number in count.items() if 2 * number > len(blocks)}
        missing += [f"{prefix}{number}.{leaf}" for number, own in blocks.items() for leaf in sorted(every - own)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: is incomplete, it lacks {min(missing)}{others}; get it again")


def part_files(where: str, folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of one part: of the variant, else without variant, else of the only variant present."""
    found = sorted(folder.glob("*.safetensors"))
    by_variant: dict[str | None, list[Path]] = {}
    for file in found:
        # diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors
        parts = file.name.removesuffix(".safetensors").split("-")[0].split(".")
        by_variant.setdefault(parts[1] if len(parts) > 1 else None, []).append(file)
    if variant in by_variant:
        return by_variant[variant]
    if variant is None and len(by_variant) == 1:
        return next(iter(by_variant.values()))
    if not found:
        raise UserError(f"{where}: {folder.name} has no .safetensors file; pickles are not read")
    variants = ", ".join(sorted(str(name) for name in by_variant))
    raise UserError(f"{where}: {folder.name} has the variants {variants}; choose one by model.variant")


def _current_name(part: str, name: str) -> str:
    """The current name of a weight in a folder: VAE folders of 2023 name the attention layers differently."""
    name = hub_name(part, name)
    if part == "vae" and ".attentions." in name:
        before, _, leaf = name.rpartition(".")
        head, _, layer = before.rpartition(".")
        if layer in OLD_VAE_NAMES:
            return f"{head}.{OLD_VAE_NAMES[layer]}.{leaf}"
    return name


def _single_file(where: str, root: Path, stored: list[StoredTensor], metadata: dict[str, str]) -> Checkpoint:
    names = [tensor.name for tensor in stored]
    refuse_other_architecture(where, names)
    levels = _count_vae_levels(names)
    checkpoint = Checkpoint(root, {}, [], dict(metadata), frozenset(names) & {"v_pred", "ztsnr"}, levels)
    extras = [name for name in names if EXTRAS.fullmatch(name)]
    if extras:
        others = f" and {len(extras) - 1} more" if len(extras) > 1 else ""
        warnings.warn(f"{where}: leaves out what is not a weight of SDXL: {extras[0]}{others}", stacklevel=2)
    for tensor in stored:
        if EXTRAS.fullmatch(tensor.name):
            continue
        if tensor.name == LOGIT_SCALE:
            checkpoint.scale = tensor
            continue
        if tensor.name.rpartition(".")[2] in IGNORED_TENSORS or tensor.name in IGNORED_TENSORS:
            continue
        try:
            place = mapping_for_single_key(tensor.name, levels)
        except KeyError:
            checkpoint.unknown.append(tensor.name)
            continue
        for index, weight in enumerate(place.weights):
            shape = place.folder_shape(tensor.shape)
            checkpoint.weights[weight] = WeightView(tensor.dtype, shape, tensor, place, index)
    refuse_quantized(where, checkpoint)
    return checkpoint


def _pickle(where: str, root: Path) -> Checkpoint:
    try:
        content = torch.load(root, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{where}: is truncated or has more than weights, so it is not opened ({reason})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    stored = [StoredTensor(DTYPE_NAMES.get(t.dtype, "?"), tuple(t.shape), root, name) for name, t in tensors.items()]
    checkpoint = _single_file(where, root, stored, {})
    checkpoint.pickled = tensors
    return checkpoint


def refuse_quantized(where: str, checkpoint: Checkpoint) -> None:
    """Raise UserError for weights that are not plain floating-point numbers."""
    unsupported = sorted({view.dtype for view in checkpoint.weights.values()} - DTYPES.keys())
    if unsupported:
        names = [name for name, view in checkpoint.weights.items() if view.dtype in unsupported]
        raise UserError(
            f"{where}: {len(names)} weights are stored as {', '.join(unsupported)}, for example {names[0]}; "
            "quantised weights are not supported: get the model in fp16, bf16 or fp32"
        )


def _count_vae_levels(names: Iterable[str]) -> int:
    """The number of down blocks of a VAE, from key names of diffusers or LDM."""
    found = (re.search(r"(?:^|[./])encoder\.down(?:_blocks)?\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=3) + 1
