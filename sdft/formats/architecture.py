"""The networks of a model on the meta device, built from the configs of a folder, and checked against checkpoints.

Knows the class of each part. Must not read weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdft.errors import UserError, listed
from sdft.formats.json_file import read_json
from sdft.formats.keys import PREFIXES, hub_name
from sdft.formats.model_checkpoint import Checkpoint

PARTS = tuple(PREFIXES)


def empty_network(part: str, config: Path) -> nn.Module:
    """The network that the config.json in the folder `config` describes, its parameters on the meta device."""
    content = read_json(config / "config.json")
    content.pop("_name_or_path", None)  # a path on the machine where it was saved
    try:
        with init_empty_weights(include_buffers=False):
            if part in ("unet", "vae"):
                network = (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(content)
            else:
                encoder = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
                network = encoder(CLIPTextConfig.from_dict(content))
    except Exception as error:  # of any kind: it is from the network's constructor, whose arguments the file has
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{config / 'config.json'}: does not describe a {part} ({reason}); get it again") from error
    return network.eval()


def parameter_names(part: str, network: nn.Module) -> dict[str, str]:
    """`part/name` in files -> the parameter's name in the network."""
    return {f"{part}/{hub_name(part, name)}": name for name, _ in network.named_parameters()}


def refuse_misfit(where: str, checkpoint: Checkpoint, networks: Mapping[str, nn.Module]) -> None:
    """Raise UserError that names missing, unexpected and misshaped weights of a checkpoint."""
    expected = {
        weight: tuple(network.get_parameter(name).shape)
        for part, network in networks.items()
        for weight, name in parameter_names(part, network).items()
    }
    found = {name: view.shape for name, view in checkpoint.weights.items() if name.split("/")[0] in networks}
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in [*(set(found) - set(expected)), *checkpoint.unknown]]
    problems += [
        f"of another shape: {name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    without = sorted({name.split("/")[0] for name in expected} - {name.split("/")[0] for name in found})
    if without == ["vae"]:
        raise UserError(f"{where}: has no VAE; pass model.vae=, a folder, a file or a hub id that has one")
    if problems:
        what = f"{len(problems)} weights do not fit the model, so nothing is loaded"
        raise UserError(f"{where}: {what}:\n{listed(problems)}")
