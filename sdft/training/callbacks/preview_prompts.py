"""The prompts of previews: each a text, or a text with settings of its own. Read and checked before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from sdft.errors import UserError, did_you_mean
from sdft.evaluation.subject_loader import file_digest, prediction_of
from sdft.formats.adapter import adapters_set_aside, applied_lora, lora_from_model
from sdft.formats.baked import lora_of, refuse_other_base
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import Layer, LoraFile
from sdft.formats.lora_stack import stack_loras
from sdft.models.streaming import streams
from sdft.protocols import DiffusionModel, Tuning
from sdft.sampling.generate import refuse_size
from sdft.sampling.samplers import Sampler, find_scheduler
from sdft.tuning import norms
from sdft.types import LARGEST

KEY = "callbacks.previews.prompts"
MAX_SIDE = 16_384
SAMPLER_SETTINGS = ("steps", "cfg", "negative", "rescale")
"""Settings of the sampler that an entry can have beside its prompt."""


class AppliedLora(NamedTuple):
    """A LoRA file that is applied for one picture. path: as the user wrote it. file: what was read. sha256: of it."""

    path: str
    file: Path
    sha256: str
    lora: LoraFile
    strength: float


@dataclass(frozen=True)
class PreviewPrompt:
    """What one picture of a preview shows.

    key: of the config, for messages. strength: of what is trained. loras: applied together with it.
    settings: those of its own, for readers.
    """

    key: str
    prompt: str
    seed: int
    size_hw: tuple[int, int]
    sampler: Sampler
    strength: float = 1.0
    loras: tuple[AppliedLora, ...] = ()
    settings: str = ""

    @property
    def label(self) -> str:
        """For readers: the prompt, after the settings that were given with it."""
        return f"{self.settings}: {self.prompt}" if self.settings else self.prompt

    def described(self, file: str) -> dict[str, Any]:
        """The entry of `prompts.json`. file: name of the picture. Equal entries have equal pictures of the base."""
        sampler = {
            name: value for name, value in self.sampler.settings.items() if name not in ("batch_size", "negative")
        }
        loras = [{"lora": one.path, "strength": one.strength, "sha256": one.sha256} for one in self.loras]
        return {
            "file": file,
            "prompt": self.prompt,
            "negative": self.sampler.negative,
            "seed": self.seed,
            "size": list(self.size_hw),
            "sampler": sampler,
            **({"strength": self.strength} if self.strength != 1 else {}),
            **({"loras": loras} if loras else {}),
        }

    def alike(self) -> tuple[Any, ...]:
        """Equal for prompts that can be drawn in one batch."""
        loras = tuple((one.file, one.strength) for one in self.loras)
        return (*self.sampler.settings.values(), self.size_hw, self.strength, loras)

    def check(self, module: Any, num_shards: int) -> None:
        """Raise UserError if this model cannot draw the picture."""
        try:
            refuse_size(module.model, self.size_hw)
            self.sampler.with_timesteps(module.model)
        except UserError as error:
            raise UserError(f"{self.key}: {error}") from error
        if not self.loras:
            return
        key = f"{self.key}.loras"
        if num_shards > 1:
            raise UserError(
                f"{key}: need whole weights, which strategy=fsdp shards; remove them, or choose strategy=ddp"
            )
        if streams(module.model):
            raise UserError(f"{key}: need the weights on the device; remove them, or set model.offload_blocks=0")
        predicts_v = module.model.scheduler.config.prediction_type == "v_prediction"
        for one in self.loras:
            if prediction_of(one.lora) is not None and not predicts_v:
                raise UserError(f"{key}: {one.path} was trained for v, and this run's model does not predict v")
            refuse_other_base(f"{key}.{one.path}", one.lora.metadata, module.model)
        with self.applied(module.model, module.tuning, trained=True):
            pass

    @contextmanager
    def applied(self, model: DiffusionModel, tuning: Tuning, trained: bool) -> Iterator[None]:
        """Inside the `with`, the model draws this picture; afterwards it is the same, bit for bit.

        trained: with what is trained, at its strength; otherwise as before training. The LoRAs are there in both.
        """
        strength = self.strength if trained else 0.0
        with ExitStack() as stack:
            # Beside LoRAs, what is trained becomes one of them, at its strength.
            stack.enter_context(tuning.drawing_at(model, 1.0 if strength and self.loras else strength))
            if self.loras:
                loras = [(one.lora, one.strength) for one in self.loras]
                if strength and tuning.trains_adapters:
                    loras.insert(0, (lora_from_model(model, tuning.initial), strength))
                    stack.enter_context(norms.restored(model, tuning.initial))
                stack.enter_context(adapters_set_aside(model))
                key = f"{self.key}.loras"
                stack.enter_context(applied_lora(model, stack_loras(loras, key), key))
            yield


def read_prompts(
    entries: Sequence[str | Mapping[str, Any]], sampler: Sampler, size_hw: tuple[int, int]
) -> list[PreviewPrompt]:
    """The prompts of previews. sampler, size_hw: of entries that do not say otherwise; the seed is their number.

    Raises UserError, which starts with the config key of the entry.
    """
    if not entries:
        raise UserError(f"{KEY} is empty: give at least one prompt")
    found = []
    for number, entry in enumerate(entries):
        key = f"{KEY}[{number}]"
        if isinstance(entry, str):
            found.append(PreviewPrompt(key, entry, number, size_hw, sampler))
        else:
            found.append(_prompt(key, number, entry, sampler, size_hw))
    return found


def _prompt(
    key: str, number: int, entry: Mapping[str, Any], sampler: Sampler, size_hw: tuple[int, int]
) -> PreviewPrompt:
    for name in entry:
        if name not in WANTED:
            guess = did_you_mean(name, WANTED) or f"; a prompt takes {', '.join(WANTED)}"
            raise UserError(f"{key}.{name}: is no setting of a prompt{guess}")
    if "prompt" not in entry:
        raise UserError(f"{key}: has no prompt: write {{prompt: a photo of a cat, seed: 1}}")
    for name, value in entry.items():
        text, fits = WANTED[name]
        if not fits(value):
            raise UserError(f"{key}.{name}={value}: must be {text}")
    size = entry.get("size", size_hw)
    size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
    chosen = _sampler(key, entry, sampler)
    loras = tuple(_lora(key, path, strength) for path, strength in entry.get("loras", {}).items())
    values = chosen.settings
    named = [chosen.name] if chosen.name != sampler.name else []
    named += [
        f"{name} {values[name]:g}" for name in ("steps", "cfg", "rescale") if values[name] != sampler.settings[name]
    ]
    named += [f"without {chosen.negative}"] if "negative" in entry and chosen.negative else []
    named += [f"{name} {entry[name]:g}" for name in ("seed", "strength") if name in entry]
    named += [f"{Path(one.path).name.removesuffix('.safetensors')} {one.strength:g}" for one in loras]
    return PreviewPrompt(
        key,
        entry["prompt"],
        entry.get("seed", number),
        size_hw,
        chosen,
        float(entry.get("strength", 1.0)),
        loras,
        ", ".join(named),
    )


def _sampler(key: str, entry: Mapping[str, Any], sampler: Sampler) -> Sampler:
    """The run's sampler with an entry's settings."""
    chosen = entry.get("sampler", {})
    beside = {name: entry[name] for name in SAMPLER_SETTINGS if name in entry}
    if isinstance(chosen, Sampler):
        chosen = chosen.settings
    elif isinstance(chosen, str):
        chosen = {"name": chosen}
    for name, value in chosen.items():
        where = f"{key}.sampler.{name}"
        if name not in SETTINGS:
            raise UserError(f"{where}: is no setting of a sampler{did_you_mean(name, SETTINGS)}")
        if not SETTINGS[name][1](value):
            raise UserError(f"{where}={value}: must be {SETTINGS[name][0]}")
        if beside.get(name, value) != value and not isinstance(entry["sampler"], Sampler):
            raise UserError(f"{where}={value}: {key}.{name} is {beside[name]}; remove one of them")
    if "name" in chosen:
        find_scheduler(chosen["name"], f"{key}.sampler.name")
    return Sampler(**{**sampler.settings, **chosen, **beside})


def _lora(key: str, path: str, strength: float) -> AppliedLora:
    where = f"{key}.loras"
    file = lora_of(where, Path(path).expanduser())
    if not file.is_file():
        raise UserError(f"{where}: there is no file {path}")
    lora = read_lora(file, f"{where}.{path}")
    # Copies: a file that is written anew during the run would take the mapped ones away.
    layers = {
        name: Layer({tensor: value.clone() for tensor, value in layer.tensors.items()}, layer.alpha)
        for name, layer in lora.layers.items()
    }
    vectors = {name: value.clone() for name, value in lora.vectors.items()}
    return AppliedLora(path, file, file_digest(file), LoraFile(layers, lora.metadata, vectors), float(strength))


def _is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and low <= value <= high


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value]
    return len(sides) in (1, 2) and all(_is_whole(side, 1, MAX_SIDE) for side in sides) and value != [*sides[:1]]


def _are_loras(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _is_number(v) for k, v in value.items())


Checks = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Name -> what it must be, in words, and whether a value is that."""
SETTINGS: Checks = {
    "name": ("the name of a sampler", lambda value: isinstance(value, str)),
    "steps": ("a number of steps, 1 to 1000", lambda value: _is_whole(value, 1, 1000)),
    "cfg": ("a number, 0 or more", lambda value: _is_number(value, 0)),
    "negative": ("a text", lambda value: isinstance(value, str)),
    "rescale": ("a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
    "batch_size": ("a number of images", lambda value: _is_whole(value, 1, 65_536)),
}
WANTED: Checks = {
    "prompt": ("a text", lambda value: isinstance(value, str)),
    "seed": ("a whole number, 0 or more", lambda value: _is_whole(value, 0, 2**63 - 1)),
    "size": ("a side in pixels, or [height, width]", _is_size),
    "sampler": (
        "the name of a sampler, or its settings, {name: ddim, steps: 30}",
        lambda value: isinstance(value, str | Mapping | Sampler),
    ),
    **{name: SETTINGS[name] for name in SAMPLER_SETTINGS},
    "strength": ("a number, 0 or more; 1 is as trained", lambda value: _is_number(value, 0)),
    "loras": ("paths of LoRAs and their strengths, {FILE: 0.7}", _are_loras),
}
