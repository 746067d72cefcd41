"""SDXL with random weights, at its real size or thin: for benchmarks and tests of what users of the real model type.

    python -m benchmarks.synthetic FOLDER [--divisor 8] [--dtype fp16]

Writes `sdxl.safetensors`, a single file with the 2,641 tensors of SDXL, and `config/`, its configs and tokenizers of
SDXL's size. A run reads them by `model=sdxl model.weights=FOLDER/sdxl.safetensors model.config=FOLDER/config`. The
topology and all names are SDXL's; `divisor` divides the widths: by 8, the model has 1/64 of the weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdft.formats.architecture import PARTS, empty_network, parameter_names
from sdft.formats.diffusers_folder import write_json
from sdft.formats.json_file import read_json
from sdft.formats.keys import mapping_for_weight
from sdft.formats.safetensors_io import DTYPE_NAMES, TensorInfo, write_tensors
from sdft.models.load import SDXL_BASE
from sdft.models.nano.build import tokenizer
from sdft.types import DTYPES

WIDTHS = {
    "unet": ("block_out_channels", "cross_attention_dim", "norm_num_groups"),
    "vae": ("block_out_channels", "norm_num_groups"),
    "text_encoder": ("hidden_size", "intermediate_size", "projection_dim"),
    "text_encoder_2": ("hidden_size", "intermediate_size", "projection_dim"),
}
"""The widths of each part's config. Heads stay as many as they are, each of them narrower."""
GAIN = 0.7
"""Of random layers: the variance of what passes through them shrinks a little, so that no activation overflows."""
WORDS = ("a", "photo", "of", "the", "in", "style", "cat", "dog", "shoe", "on", "table", "night", "neon", "drawing")
"""That the tokenizers know; all other text falls back to letters, as rare words of SDXL do to pieces."""


class Synthetic(NamedTuple):
    """The files of a synthetic model."""

    weights: Path
    """One .safetensors file."""
    config: Path
    """A folder."""

    @property
    def overrides(self) -> list[str]:
        """For a command: the real model's options, with these weights."""
        return ["model=sdxl", f"model.weights={self.weights}", f"model.config={self.config}"]


def write_synthetic(folder: Path, divisor: int = 1, dtype: torch.dtype = torch.float16, seed: int = 0) -> Synthetic:
    """Write the model into `folder`, one tensor at a time. Seeds differ in every weight."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Synthetic(folder / "sdxl.safetensors", folder / "config")
    write_config(written.config, divisor)
    write_weights(written.weights, written.config, dtype, seed)
    return written


def write_config(folder: Path, divisor: int = 1) -> None:
    """SDXL's configs, their widths divided, and tokenizers whose vocabulary has CLIP's size."""
    shutil.copytree(SDXL_BASE, folder, dirs_exist_ok=True)
    for part, names in WIDTHS.items():
        file = folder / part / "config.json"
        config = read_json(file)
        write_json(file, config | {name: narrowed(config[name], divisor) for name in names})
    unet = folder / "unet" / "config.json"
    config = read_json(unet)
    pooled = read_json(folder / "text_encoder_2" / "config.json")["projection_dim"]
    write_json(unet, config | {"projection_class_embeddings_input_dim": pooled + 6 * config["addition_time_embed_dim"]})
    size = read_json(folder / "text_encoder" / "config.json")["vocab_size"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer(WORDS, pad, size).save_pretrained(folder / name)


def narrowed(width: Any, divisor: int) -> Any:
    """A width, or a list of them, divided."""
    return [narrowed(one, divisor) for one in width] if isinstance(width, list) else max(width // divisor, 1)


def write_weights(path: Path, config: Path, dtype: torch.dtype, seed: int) -> None:
    """A single file of random weights, scaled so that a forward pass keeps finite; all tensors are different."""
    noise = torch.randn(2**25, generator=torch.Generator().manual_seed(seed))
    entries, scales, starts = {}, {}, {}
    for part in PARTS:
        network = empty_network(part, config / part)
        for weight, name in parameter_names(part, network).items():
            shape = tuple(network.get_parameter(name).shape)
            place = mapping_for_weight(part, weight.split("/", 1)[1])
            entries[place.single] = TensorInfo(DTYPE_NAMES[dtype], place.single_shape(shape))
            is_norm = len(shape) == 1 and name.endswith("weight")
            fan_in = torch.Size(shape[1:]).numel()
            scales[place.single] = (1.0, 0.01) if is_norm else (0.0, GAIN / fan_in**0.5 if len(shape) > 1 else 0.01)
            starts[place.single] = 997 * len(starts)

    def compute(name: str) -> torch.Tensor:
        shape, (mean, deviation) = torch.Size(entries[name].shape), scales[name]
        block = noise[starts[name] :][: shape.numel()]
        values = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()]
        return values.mul(deviation).add_(mean).to(dtype).view(shape)

    write_tensors(path, entries, {"format": "pt"}, compute)


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--divisor", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    written = write_synthetic(args.folder, args.divisor, DTYPES[args.dtype], args.seed)
    print(" ".join(written.overrides))


if __name__ == "__main__":
    main()
