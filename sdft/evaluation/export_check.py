"""Checks exported files: reads each one back and compares its weights with those of the trained model.

Neither a second model nor anything whole in fp32 is held: adapters are compared layer by layer, whole models weight by
weight. The files are written by `formats`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sdft.errors import UserError
from sdft.formats.adapter import adapted_layers, applied_lora, lora_from_model, read_words, remove_adapters
from sdft.formats.json_file import read_json
from sdft.formats.keys import hub_name
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import UP, Layer, LoraFile
from sdft.formats.safetensors_io import DTYPES, MappedFile, StoredTensor, read_header
from sdft.models.quantized import QuantizedLinear, quantized_layers
from sdft.protocols import DiffusionModel
from sdft.rng import generator

PROMPTS = ("a photo of a cat", "")
NUM_INPUTS, SIDE = 8, 8
"""Of the inputs of a compared layer: rows, and height and width for a convolution."""
MIN_LAYER_CHANGE = 1e-3
"""Smallest change of a layer's output by training, relative to it, that errors are divided by: a smaller one is below
the rounding of half precision."""
CHUNK = 2**20
"""Elements that are compared at a time."""
MIN_EFFECT = 0.05
"""Smallest change of a part's weights by training, relative to them, that errors are divided by.

If training changed less, errors are divided by this, or rounding errors would look large."""
OWN_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version", "model_type"}
"""Entries of a text encoder's config that saving changes."""


def export_errors(
    model: DiffusionModel, initial: Mapping[str, Tensor], written: Mapping[str, Path], words: Sequence[str] = ()
) -> dict[str, float]:
    """The error of each file, relative to the change by training.

    Of an adapter, the largest of its layers' errors: root mean square of the difference of the outputs for random
    inputs, divided by that of their change by training. Of a whole model likewise, of its parts' weights; of trained
    norms and biases, of each.

    initial: weights before training, by name; others did not change. written: kind of file -> path. words: new ones.

    Raises UserError for a model whose configs, tokenizers or names of weights are not the trained model's.
    """
    errors = {}
    for kind, path in written.items():
        if kind == "words":
            errors[kind] = words_error(model, path, words)
        elif kind == "model":
            errors[kind] = weights_error(model, initial, read_folder(model, path))
        elif kind == "single_file":
            errors[kind] = weights_error(model, initial, read_single_file(model, path, written["model"]))
        else:
            errors[kind] = adapter_error(model, path, kind, initial)
    return errors


@torch.no_grad()
def adapter_error(model: DiffusionModel, path: Path, kind: str, initial: Mapping[str, Tensor]) -> float:
    """The error of an adapter file, read by diffusers if it can read it, on a skeleton of the model."""
    trained, read = lora_from_model(model, initial), read_lora(path, kind)
    if read.layers.keys() != trained.layers.keys() or read.vectors.keys() != trained.vectors.keys():
        return math.inf
    vectors = (vector_error(read.vectors[weight], change.cpu()) for weight, change in trained.vectors.items())
    # diffusers 0.42 ignores an alpha of one layer that differs from the others' in a file with kohya's names.
    scales = max(scale_error(read.layers[name], layer) for name, layer in trained.layers.items())
    skeleton, kinds = without_weights(model), {layer.kind for layer in read.layers.values()}
    pipeline = skeleton.pipeline()
    with ExitStack() as stack:
        # diffusers 0.42 cannot read all kinds, and drops the magnitudes of a DoRA with kohya's names.
        if pipeline is None or read.not_in_diffusers or (kind == "lora_kohya" and "dora" in kinds):
            stack.enter_context(applied_lora(skeleton, LoraFile(read.layers), kind))
        else:
            pipeline.load_lora_weights(str(path))
        again = adapted_layers(skeleton)
        layers = (layer_error(name, layer, again.get(name)) for name, layer in adapted_layers(model).items())
        return max(scales, *layers, *vectors)


@torch.no_grad()
def quantization_errors(model: DiffusionModel) -> dict[str, float]:
    """What quantising the base changes, by part, relative to what training changed; empty if nothing is quantised.

    A file holds the adapter only, and others apply it to the original base. Both are root mean squares over the adapted
    layers' outputs for random inputs, relative to the outputs.
    """
    sums: dict[str, list[float]] = {}
    if model.original_weights is None:
        return {}
    with model.original_weights().opened() as read:
        for name, layer in adapted_layers(model).items():
            part, _, module = name.partition(".")
            if not isinstance(layer.get_base_layer(), QuantizedLinear):
                continue
            trained = copy.deepcopy(layer).to("cpu", torch.float32).eval()
            base = trained.get_base_layer()
            x = torch.randn(NUM_INPUTS, base.in_features, generator=generator(0, "export", name))
            original = read(f"{part}/{hub_name(part, f'{module}.weight')}").float()
            expected = x @ original.T
            total = sums.setdefault(part, [0.0, 0.0])
            total[0] += (rms(x @ (base.weight - original).T) / rms(expected)) ** 2
            total[1] += (rms(trained(x) - base(x)) / rms(expected)) ** 2
    return {part: math.sqrt(error / change) if change else math.inf for part, (error, change) in sums.items()}


def without_weights(model: DiffusionModel) -> DiffusionModel:
    """A copy of the model without adapters whose weights are zeros that take no memory, in fp32."""
    zero = torch.zeros(())
    memo: dict[int, Any] = {id(p): nn.Parameter(zero.expand(p.shape), requires_grad=False) for p in model.parameters()}
    skeleton = copy.deepcopy(model, memo).eval()
    for part in skeleton.PARTS:
        network = skeleton.get_submodule(part)
        remove_adapters(network)
        for name, layer in list(quantized_layers(network)):
            network.set_submodule(name, plain_layer(layer, zero))
    return skeleton


def plain_layer(layer: QuantizedLinear, zero: Tensor) -> nn.Linear:
    """An unquantised layer of the same shape and bias whose weights are zeros that take no memory."""
    with init_empty_weights():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(zero.expand(layer.out_features, layer.in_features), requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


def layer_error(name: str, trained: Any, read: Any) -> float:
    """The error of one layer with its adapter: both are given the same weights and inputs, in fp32 on the CPU."""
    if read is None:
        return math.inf
    ours, theirs = (copy.deepcopy(layer).to("cpu", torch.float32).eval() for layer in (trained, read))
    theirs.base_layer = base = ours.get_base_layer()
    shape = (1, base.in_channels, SIDE, SIDE) if isinstance(base, nn.Conv2d) else (NUM_INPUTS, base.in_features)
    x = torch.randn(shape, generator=generator(0, "export", name))
    untrained, expected = base(x), ours(x)
    change = max(rms(expected - untrained), MIN_LAYER_CHANGE * rms(untrained))
    return rms(theirs(x) - expected) / change if change else 0.0


def scale_error(read: Layer, trained: Layer) -> float:
    """The error of the scale of a layer, of which `up` may have taken a part: see `with_one_alpha`.

    That part is rounded as in the file: of a short training, fp16 leaves few digits.
    """
    share = trained.scale / read.scale if read.scale else math.inf
    if UP not in trained.tensors:
        return abs(1 / share - 1)
    up = read.tensors[UP]
    expected = rms((trained.tensors[UP].cpu().float() * share).to(up.dtype))
    if expected == 0:
        return math.inf if up.any() else 0.0
    return abs(rms(up) / expected - 1)


def vector_error(read: Tensor, trained: Tensor) -> float:
    """The error of the change of a norm or a bias, relative to it."""
    if read.shape != trained.shape:
        return math.inf
    change = rms(trained)
    return rms(read.to(trained) - trained) / change if change else math.inf if read.any() else 0.0


def words_error(model: DiffusionModel, path: Path, words: Sequence[str]) -> float:
    """The error of the embeddings of new words, relative to the embeddings; infinite for other words."""
    vectors, rows = read_words(path)
    trained = model.word_rows
    shapes = [{name: row.shape for name, row in found.items()} for found in (rows, trained)]
    if vectors != {word: model.word_vectors.get(word, 1) for word in words} or shapes[0] != shapes[1]:
        return math.inf
    return max(rms(rows[name] - row.detach().cpu()) / rms(row.detach()) for name, row in trained.items())


def nothing() -> None:
    """Frees no memory."""


@dataclass(frozen=True)
class ReadWeight:
    """A weight of an exported model as a library reads it.

    name: of the trained model's parameter. value: what is read; a view of the file where that is possible.
    release: frees the memory in which the file is mapped.
    """

    name: str
    value: Tensor
    release: Callable[[], None] = nothing


@torch.no_grad()
def weights_error(model: DiffusionModel, initial: Mapping[str, Tensor], read: Iterable[ReadWeight]) -> float:
    """The largest error of a part's weights in a file.

    A weight may differ from the trained one by being rounded to the file's dtype. One that differs otherwise counts by
    itself, so that it is not lost among the others.
    """
    parameters, errors = dict(model.named_parameters()), []
    sums = {part: [0.0, 0.0, 0.0] for part in model.PARTS}
    missing = set(parameters)
    for weight in read:
        trained, before = parameters[weight.name], initial.get(weight.name)
        change = 0.0 if before is None else squares(weight.value, before)
        found = squares(weight.value, trained), change, squares(trained)
        if torch.equal(weight.value, trained.to("cpu", weight.value.dtype)):
            total = sums[weight.name.partition(".")[0]]
            total[:] = [one + more for one, more in zip(total, found, strict=True)]
        else:
            errors.append(relative(*found))
        missing.discard(weight.name)
        weight.release()
    if missing:
        raise UserError(f"export: the file lacks {len(missing)} weights, for example {min(missing)}; do not use it")
    return max([*errors, *(relative(*total) for total in sums.values())])


def relative(difference: float, change: float, weights: float) -> float:
    """An error relative to the change by training; all three are sums of squares."""
    change = max(change, MIN_EFFECT**2 * weights)
    return math.sqrt(difference / change) if change else math.inf if difference else 0.0


def read_folder(model: DiffusionModel, folder: Path) -> Iterator[ReadWeight]:
    """Reads a diffusers folder. The denoiser's weights are mapped; the other parts are loaded one after another."""
    skeleton, ours = without_weights(model), model.pipeline()
    again = type(ours).from_pretrained(folder, **{part: skeleton.get_submodule(part) for part in model.PARTS})
    refuse_other_tokens(ours, again, folder)
    refuse_other_config(folder / "scheduler", model.scheduler.config, again.scheduler.config)
    for part in model.PARTS:
        network = model.get_submodule(part)
        (file,) = (folder / part).glob("*.safetensors")
        stored, _ = read_header("export", file)
        if part != model.DENOISER:
            yield from loaded(
                part, network, type(network).from_pretrained(folder / part, dtype=DTYPES[stored[0].dtype])
            )
            continue
        with init_empty_weights():
            expected = type(network).from_config(read_json(folder / part / "config.json"))
        refuse_other_config(folder / part, network.config, expected.config)
        mapped = MappedFile(file)
        yield from views(part, {hub_name(part, one.name): mapped.tensor(one) for one in stored}, mapped, stored)


def read_single_file(model: DiffusionModel, path: Path, folder: Path) -> Iterator[ReadWeight]:
    """Reads a model in one file. diffusers renames the denoiser's mapped weights; the other parts it loads."""
    stored, _ = read_header("export", path)
    dtype, denoiser = DTYPES[stored[0].dtype], model.denoiser
    options = {"config": str(folder), model.DENOISER: without_weights(model).denoiser}
    pipeline = type(model.pipeline()).from_single_file(str(path), torch_dtype=dtype, **options)
    for part in model.PARTS:
        if part != model.DENOISER:
            yield from loaded(part, model.get_submodule(part), getattr(pipeline, part))
    del pipeline
    mapped = MappedFile(path)
    rename = SINGLE_FILE_LOADABLE_CLASSES[type(denoiser).__name__]["checkpoint_mapping_fn"]
    file = {one.name: mapped.tensor(one) for one in stored if one.dtype in DTYPES}
    yield from views(model.DENOISER, rename(checkpoint=file, config=denoiser.config), mapped, stored)


def loaded(part: str, trained: nn.Module, read: nn.Module) -> Iterator[ReadWeight]:
    """The weights of a part that a library has loaded."""
    refuse_other_config(Path(part), comparable(trained.config), comparable(read.config))
    for name, value in read.named_parameters():
        yield ReadWeight(f"{part}.{name}", value)


def views(
    part: str, read: Mapping[str, Tensor], mapped: MappedFile, stored: list[StoredTensor]
) -> Iterator[ReadWeight]:
    """The weights of a part as views of a file, each with the pages that can be dropped after it."""
    start = mapped.tensor(stored[0]).data_ptr() - stored[0].start
    places = {one.start: one for one in stored}
    for name, value in read.items():
        place = places.get(value.data_ptr() - start)
        yield ReadWeight(f"{part}.{name}", value, partial(mapped.drop_pages, place) if place else nothing)


def comparable(config: Any) -> dict[str, Any]:
    """The entries of a network's config that saving does not change."""
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in entries.items() if not name.startswith("_") and name not in OWN_CONFIG}


def refuse_other_config(path: Path, trained: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise UserError if a config that was read back differs from that of the trained model."""
    for name, value in trained.items():
        if not name.startswith("_") and plain(read.get(name)) != plain(value):
            raise UserError(f"export: {path} says {name}={read.get(name)!r}, not {value!r}; do not use it")


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def refuse_other_tokens(pipeline: Any, read: Any, folder: Path) -> None:
    """Raise UserError if a tokenizer of a pipeline that was read back splits prompts in another way."""
    for name, tokenizer in pipeline.components.items():
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            for prompt in PROMPTS:
                options = {"padding": "max_length", "truncation": True}
                if tokenizer(prompt, **options).input_ids != read.components[name](prompt, **options).input_ids:
                    problem = f"{name} does not read {prompt!r} as the trained model's does"
                    raise UserError(f"export: {folder}: {problem}; do not use it")


def squares(x: Tensor, minus: Tensor | None = None) -> float:
    """The sum of squares of a tensor, or of a difference, in fp64."""
    total = 0.0
    parts = [x.detach().reshape(-1), *([] if minus is None else [minus.detach().reshape(-1)])]
    for chunks in zip(*(part.split(CHUNK) for part in parts), strict=True):
        one, *other = (chunk.to("cpu", torch.float32) for chunk in chunks)
        total += float((one - other[0] if other else one).square().sum(dtype=torch.float64))
    return total


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.double().square().mean().sqrt().item()
