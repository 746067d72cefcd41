"""Checks exported files: loads each one and compares its prediction with that of the trained model.

One small forward pass per file. The files are written by `formats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sdft.evaluation.subject_loader import with_lora, with_words
from sdft.formats.adapter import cast_base_weights, lora_from_model
from sdft.formats.lora_file import read_lora
from sdft.protocols import DiffusionModel
from sdft.rng import generator

LATENT_SIDE = 16
MIN_EFFECT = 0.05
"""Smallest change of the prediction by training, relative to it, that errors are divided by.

If training changed less, errors are divided by this, or rounding errors would look large."""


def export_errors(
    model: DiffusionModel,
    base: Callable[[], AbstractContextManager],
    written: Mapping[str, Path],
    reload: Callable[[], DiffusionModel],
    words: tuple[str, ...] = (),
) -> dict[str, float]:
    """The error of each file's prediction, relative to the change of the prediction by training.

    base: context manager in which `model` is the base model.
    written: kind of file -> path. reload: loads the base model again, to apply adapters to.
    """
    # In fp32: rounding of activations in half precision would hide errors of the weights.
    dtypes = {part: getattr(model, part).dtype for part in model.PARTS}
    model.float()
    trained = probe(model, words)
    with base():
        scales = [max(rms(a - b), MIN_EFFECT * rms(a)) for a, b in zip(trained, probe(model, words), strict=True)]
    errors = {}
    for name in written:
        if name == "words":
            continue  # read together with each LoRA
        layers = lora_from_model(model).layers
        if name.startswith("lora") and read_lora(written[name], name).layers.keys() != layers.keys():
            errors[name] = math.inf  # one layer of many would hardly show in the prediction
            continue
        with opened(name, written, reload, model) as again:
            differences = zip(trained, probe(again, words), scales, strict=True)
            errors[name] = max(rms(a - b) / scale for a, b, scale in differences)
    for part, dtype in dtypes.items():
        cast_base_weights(getattr(model, part), dtype)
    return errors


@torch.no_grad()
def probe(model: DiffusionModel, words: tuple[str, ...]) -> list[Tensor]:
    """The prediction on fixed noise for a few prompts, and the decoded image of the same noise."""
    prompts = ["a photo of a cat", *words]
    shape = (len(prompts), model.latent_channels, LATENT_SIDE, LATENT_SIDE)
    z_BCHW = torch.randn(shape, generator=generator(0, "parity")).to(model.device)
    side = LATENT_SIDE * model.vae_factor
    t_B = torch.full((len(prompts),), 500, device=model.device)
    context_BLD, pooled_BP = model.encode_prompts(prompts)
    prediction = model.denoise(z_BCHW, t_B, model.condition_prompts(context_BLD, pooled_BP, (side, side)))
    return [prediction, model.decode(z_BCHW[:1])]


@contextmanager
def opened(
    name: str, written: Mapping[str, Path], reload: Callable[[], DiffusionModel], trained: DiffusionModel
) -> Iterator[DiffusionModel]:
    """Context manager that loads the model of a file in fp32, by diffusers if it can read the file."""
    if name in ("model", "single_file"):
        options = {"dtype": torch.float32, "add_watermarker": False}
        diffusers_class = type(trained.pipeline())
        if name == "model":
            pipeline = diffusers_class.from_pretrained(written[name], **options)
        else:
            config = str(written["model"])
            pipeline = diffusers_class.from_single_file(str(written[name]), config=config, **options)
        yield trained.from_pipeline(pipeline)
        return
    model = reload().eval().float()
    kinds = {layer.kind for layer in read_lora(written[name], name).layers.values()}
    pipeline = model.pipeline()
    with ExitStack() as stack:
        # diffusers 0.42 cannot read LoHa and LoKr, and drops the magnitudes of a DoRA with kohya's names.
        if pipeline is None or kinds & {"loha", "lokr"} or (name == "lora_kohya" and "dora" in kinds):
            stack.enter_context(with_lora(model, written[name], name))
        else:
            pipeline.load_lora_weights(str(written[name]))
        if "words" in written:
            stack.enter_context(with_words(model, written["words"]))
        yield model


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.double().square().mean().sqrt().item()
