"""What a finished run says of itself, as far as it may be published: numbers and names, and no paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdft.board.outputs import CHOICE
from sdft.choosing.run import CHOICE_PICTURE, RECOMMENDED, WORDS
from sdft.errors import UserError
from sdft.evaluation.subjects import HUB_ID
from sdft.evaluation.watching import FIGURES
from sdft.formats.adapter import WordsFile, read_words
from sdft.formats.json_file import read_json
from sdft.formats.lora_file import read_lora
from sdft.formats.run_folder import BEFORE_AFTER, RECEIPT, SUMMARY, read_run_outputs

KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT"}
PARTS = {"unet": "the UNet", "text_encoder": "the first text encoder", "text_encoder_2": "the second text encoder"}
Kind = Literal["adapter", "words", "model"]


@dataclass(frozen=True)
class Facts:
    """A finished run.

    run: its folder. kind: what it trained; an adapter may have new words beside it.
    base: hub id of the base model; None if it was read from a file. base_name: of that file, or the hub id.
    artifacts: kind -> file. config, summary: its config, and summary.json. receipt: receipt.json. sha256: of that file.
    words: the new words, if there are any.
    chosen: the entry of choice.json, if the weights are the recommended ones and not those of the end.
    """

    run: Path
    kind: Kind
    base: str | None
    base_name: str
    artifacts: Mapping[str, Path]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    receipt: Mapping[str, Any]
    sha256: str
    words: WordsFile | None
    chosen: Mapping[str, Any] | None = None

    @property
    def comparison(self) -> Path:
        """The picture that shows the base model's images and those of the weights."""
        return self.run / (BEFORE_AFTER if self.chosen is None else CHOICE_PICTURE)

    @property
    def is_nano(self) -> bool:
        return self.base_name == "nano"

    @property
    def method(self) -> str:
        """Of an adapter: LoRA, DoRA and so on."""
        return KINDS.get(str(self.value("tuning.method")), "LoRA")

    @property
    def trigger(self) -> str | None:
        """What a prompt needs for what was learned: the new words, else what the template of captions adds."""
        if self.words is not None:
            return ", ".join(self.words.vectors)
        template = str(self.value("caption") or "{caption}")
        return template.replace("{caption}", "").strip(" ,.") or None

    @property
    def example(self) -> str:
        """A prompt that asks for what was learned."""
        prompts = [prompt for prompt in self.value("prompts") or () if isinstance(prompt, str)] or ["a photo"]
        template = str(self.value("caption") or "{caption}")
        has_word = self.words is not None and any(word in prompts[0] for word in self.words.vectors)
        return prompts[0] if has_word else template.replace("{caption}", prompts[0])

    @property
    def predicts_v(self) -> bool:
        return self.value("objective.prediction") == "v_prediction"

    def value(self, key: str) -> Any:
        """A value of the config by its dotted key; None if there is none."""
        found: Any = self.config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def figure(self, name: str) -> float | None:
        """A number of the summary; None for what was not measured."""
        found = self.summary.get(name)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def read_facts(run: Path, base: str | None = None, recommended: bool = False) -> Facts:
    """The facts of a run.

    base: hub id of its base model, if the user says so. recommended: of the weights that choosing recommends.

    Raises UserError if the run did not finish, or left nothing that can be published.
    """
    key = f"run={run}"
    outputs = read_run_outputs(run) if run.is_dir() else None
    if outputs is None:
        raise UserError(f"{key}: is no finished run (no {SUMMARY}); pass the folder of one")
    chosen, artifacts = chosen_of(run) if recommended else (None, outputs.artifacts)
    for name, path in artifacts.items():
        if not path.exists():
            raise UserError(f"{key}: its {name}, {path.name}, is missing")
    file = run / RECEIPT
    receipt = read_json(file, f"{key}: {RECEIPT}")
    config = receipt.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{key}: {RECEIPT} has no config")
    words = read_words(artifacts["words"], key) if "words" in artifacts else None
    if {"lora", "lora_kohya"} & artifacts.keys():
        kind: Kind = "adapter"
    elif (artifacts.get("model", run) / "model_index.json").is_file():
        kind = "model"
    elif words is not None:
        kind = "words"
    else:
        raise UserError(f"{key}: left no LoRA, no new words and no whole SDXL model to publish")
    weights = str((config.get("model") or {}).get("weights") or "")
    if base is None and re.fullmatch(HUB_ID, weights) and not Path(weights).expanduser().exists():
        base = weights
    name = weights if weights == "nano" else base or Path(weights.replace("\\", "/")).name or "merge.safetensors"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Facts(run, kind, base, name, artifacts, config, outputs.summary, receipt, sha256, words, chosen)


def chosen_of(run: Path) -> tuple[Mapping[str, Any], dict[str, Path]]:
    """The recommended entry of choice.json, and its files by kind, of which `lora` is a file to convert for diffusers.

    Raises UserError if nothing was chosen.
    """
    key = "weights=recommended"
    if not (run / CHOICE).is_file():
        raise UserError(f"{key}: nothing was chosen yet; python -m sdft.choosing run={run}")
    found = read_json(run / CHOICE, f"{key}: {CHOICE}")
    entries = [
        one
        for one in found.get("candidates") or ()
        if (one.get("step"), one.get("strength")) == (found.get("step"), found.get("strength"))
    ]
    if not entries or not found.get("recommended"):
        raise UserError(f"{key}: none of the checkpoints of {run} is recommended; keep {found.get('reason')}")
    files = {"lora_kohya": f"{RECOMMENDED}.safetensors", "words": WORDS}
    artifacts = {kind: run / name for kind, name in (files | {"model": RECOMMENDED}).items() if (run / name).exists()}
    if found["recommended"] not in {path.name for path in artifacts.values()}:
        raise UserError(f"{key}: {found['recommended']} is missing; python -m sdft.choosing run={run}")
    if lora := artifacts.get("lora_kohya"):
        artifacts |= {} if read_lora(lora, key).not_in_diffusers else {"lora": lora}
    return entries[0], artifacts


def data_of(facts: Facts) -> list[str]:
    """The images in sentences: how many, of which sizes, how captioned. Earlier versions recorded none of it."""
    found = mapping(facts.receipt.get("images"))
    if not isinstance(found.get("training"), int):
        return []
    sizes = mapping(found.get("sizes"))
    ordered = sorted(sizes.items(), key=lambda item: (-int(item[1]), item[0]))
    shown = ", ".join(f"{size} ({count})" for size, count in ordered[:6]) if len(ordered) > 1 else "".join(sizes)
    if len(ordered) > 6:
        shown += f" and {len(ordered) - 6} more sizes"
    lines = [f"{found['training']} images, trained at {shown or 'one size'} pixels (width x height)."]
    if found.get("held_out"):
        lines.append(f"{found['held_out']} more were held out for validation.")
    if found.get("different_captions"):
        words = found.get("words_per_caption")
        lines.append(f"{found['different_captions']} different captions, with {words} words in the median.")
    return lines


def settings_of(facts: Facts) -> list[tuple[str, str]]:
    """(name, value) of the settings that matter."""
    value = facts.value
    parts = [PARTS[part] for part in value("tuning.parts") or () if part in PARTS]
    words = ["the embeddings of new words"] if facts.words is not None else []
    batch = [value("data.batch_size"), value("trainer.accumulate_grad_batches")]
    optimizer, schedule, ema = (value(f"{key}._target_") for key in ("optimizer", "lr_schedule", "callbacks.ema"))
    shown = {
        "trained": ", ".join([*parts, *words]),
        "rank": value("tuning.rank") if facts.kind == "adapter" else None,
        "alpha": value("tuning.alpha") if facts.kind == "adapter" else None,
        "steps": facts.summary.get("num_steps") if facts.chosen is None else facts.chosen["step"],
        "strength": facts.chosen["strength"] if facts.chosen and facts.kind == "adapter" else None,
        "batch size": batch[0] * batch[1] if all(isinstance(one, int) for one in batch) else None,
        "optimizer": last_name(optimizer),
        "learning rate": value("optimizer.lr"),
        "schedule": last_name(schedule),
        "resolution": value("size"),
        "prediction": value("objective.prediction"),
        "loss weighting": last_name(value("objective.weighting._target_")),
        "average of weights": value("callbacks.ema.decay") if ema else None,
        "precision": value("trainer.precision"),
        "seed": value("seed"),
    }
    return [(name, str(setting)) for name, setting in shown.items() if setting not in (None, "")]


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def last_name(target: Any) -> str | None:
    """The last part of a dotted name."""
    return target.rpartition(".")[2] if isinstance(target, str) else None


def figures_of(facts: Facts) -> list[str]:
    """What was measured after training, in sentences; and what was not."""
    if facts.chosen is not None:
        return chosen_figures(facts.chosen)
    found = []
    if (gain := facts.figure("style_gain")) is not None:
        found.append(
            f"**Style gain {gain:.2f}.** 0 is the base model, 1 would be as close to held-out images of the style as "
            "these are to each other."
        )
    if (without := facts.figure("style_gain_without_word")) is not None:
        found.append(
            f"**Style gain without the trigger word {without:.2f}.** Near 0, images without it stay as they were."
        )
    if (identity := facts.figure("identity")) is not None:
        found.append(
            f"**Identity {identity:.2f}.** 0 is the base model, 1 would be as similar to the subject as its own images "
            "are to each other."
        )
    if (recognised := facts.figure("recognised")) is not None:
        base = facts.figure("recognised_base")
        of_base = f", of the base model's {base:.0%}" if base is not None else ""
        found.append(f"**Recognised in {recognised:.0%} of images**{of_base}.")
    if (rate := facts.figure("win_rate")) is not None:
        right = facts.figure("judge_accuracy")
        judge = f" The judge is right for {right:.0%} of held-out pairs." if right is not None else ""
        found.append(f"**Preferred to the base model's image for {rate:.0%} of prompts.**{judge}")
    adherence, base = facts.figure("adherence"), facts.figure("adherence_base")
    if adherence is not None:
        before = f", the base model {base:.2f}" if base is not None else ""
        found.append(f"**Prompts are followed: {adherence:.2f}**{before}, as a CLIP model sees it.")
    if (forgetting := facts.figure("forgetting")) is not None:
        found.append(
            f"**Other prompts: {-forgetting:+.2f}.** By how much they are followed better than by the base model."
        )
    if (error := facts.figure("val/eps_mse")) is not None:
        found.append(f"Validation error {error:.4f} (mean squared error of the predicted noise on held-out images).")
    names = ("style_gain", "identity", "win_rate", "adherence")
    gaps = [name.replace("_", " ") for name in names if f"{name}_note" in facts.summary]
    return [*found, *([f"Not measured: {', '.join(gaps)}."] if gaps else [])]


def chosen_figures(chosen: Mapping[str, Any]) -> list[str]:
    """What was measured of the recommended weights, with 95 % intervals."""
    found = []
    for name, info in FIGURES.items():
        if isinstance(figure := chosen.get(name), Mapping):
            value, low, high = (figure[part] for part in ("value", "low", "high"))
            label = info.label[0].upper() + info.label[1:]
            found.append(f"**{label} {value:.2f}** ({low:.2f} to {high:.2f}). {info.meaning}")
    return found


def pictures_of(facts: Facts, most: int = 12) -> tuple[list[dict[str, Any]], str]:
    """(entries of single images, with their `path`; which weights drew them): of the end, else of the last preview.

    There are none of recommended weights.
    """
    if facts.chosen is not None:
        return [], ""
    folder, shown = facts.run / "samples", "the finished weights"
    file = folder / "prompts.json"
    if not file.is_file():
        steps = sorted(path for path in (facts.run / "previews").glob("step_*") if path.is_dir())
        if not steps:
            return [], ""
        folder, file = steps[-1], facts.run / "previews" / "prompts.json"
        shown = f"step {int(folder.name.removeprefix('step_'))} of {facts.summary.get('num_steps')}"
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [], ""
    entries = [
        {**entry, "path": folder / f"{number:02d}.png"}
        for number, entry in enumerate(listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
    ]
    return [entry for entry in entries if entry["path"].is_file()][:most], shown
