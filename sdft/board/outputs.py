"""What a finished run leaves: its verdict in numbers, and its files with what to do with each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdft.errors import UserError
from sdft.formats.json_file import read_json
from sdft.formats.run_folder import RECEIPT, read_summary

CHOICE = "choice.json"
USES = {
    "recommended.safetensors": "chosen by python -m sdft.choosing: a LoRA for ComfyUI, A1111 and Forge, at strength 1",
    "recommended_words.safetensors": "of the recommended step: the embeddings of new words",
    "recommended_embeddings": "the same, one file for each word: for ComfyUI and A1111",
    "recommended": "chosen by python -m sdft.choosing: a folder for diffusers",
    "lora.safetensors": "diffusers: pipeline.load_lora_weights(FILE)",
    "lora_kohya.safetensors": "ComfyUI, A1111 and Forge: copy it to models/loras or models/Lora",
    "model": "diffusers: StableDiffusionXLPipeline.from_pretrained(FILE); to train on from it: model.weights=FILE",
    "model.safetensors": "ComfyUI, A1111 and Forge: copy it to their folder of checkpoints",
    "words.safetensors": "the embeddings of all new words, for diffusers and sdft",
    "embeddings": "ComfyUI, A1111 and Forge: copy its files into their folder embeddings; a word is named by its file",
    "before_after.png": "the same prompts and seeds, base model above, tuned model below",
    "choice.png": "pictures of the checkpoints that were compared",
    "importance.safetensors": "for merging: merge=fisher",
    "checkpoints/last.ckpt": "to train on: resume=FILE",
    "checkpoints/best.ckpt": "the checkpoint with the best validation loss, or by pictures",
    "summary.json": "metrics, times and paths",
    "receipt.json": "repeat the run: python train.py reproduce=FILE",
    "metrics.csv": "every logged value by step, of the last start",
    "history.jsonl": "every logged value by step, over all starts",
}
"""Of the files that a run may leave, in the order of the page."""
MEANINGS = {
    "style_gain": "how far the pictures have moved to the style: 0 is the base model, 1 the style itself",
    "style_gain_without_word": "the same, of prompts without the trigger word",
    "identity": "how far the pictures have moved to the subject: 0 is the base model, 1 pictures of it",
    "recognised": "share of pictures in which the subject is recognised",
    "win_rate": "how often the tuned model's picture is preferred to the base model's",
    "adherence": "how well the pictures show what their prompts say, as the judge sees it",
    "adherence_base": "the same of the base model",
    "accuracy": "share of held-out pictures that are named rightly",
    "val/eps_mse": "error on held-out pictures; compares across runs",
    "train_seconds": "time of training",
}
"""Of the figures of a summary that matter most, in this order; others are listed below."""


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """summary.json; None if there is none, or none that can be read."""
    try:
        return read_summary(run_dir)
    except UserError:
        return None


def receipt_of(run_dir: Path) -> dict[str, Any]:
    """receipt.json; empty if there is none that can be read."""
    file = run_dir / RECEIPT
    try:
        return read_json(file) if file.is_file() else {}
    except UserError:
        return {}


def verdict_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a summary: `name`, `value` (null for one that was not measured), `note` and `meaning`.

    Those with a meaning come first.
    """
    found = []
    for name in sorted(summary, key=lambda name: [*MEANINGS, name].index(name)):
        value = summary[name]
        if (value is None or isinstance(value, int | float)) and not isinstance(value, bool) and name != "num_steps":
            note = str(summary.get(f"{name}_note") or "")
            found.append({"name": name, "value": value, "note": note, "meaning": MEANINGS.get(name, "")})
    return found


def files_of(run_dir: Path) -> list[dict[str, Any]]:
    """The files of a run: `path` in its folder, `bytes`, and what it is for (`use`)."""
    found = []
    for name, use in USES.items():
        path = run_dir / name
        if path.exists():
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            found.append({"path": name, "bytes": sum(file.stat().st_size for file in files), "use": use})
    return found


def choice_of(run_dir: Path) -> dict[str, str | None] | None:
    """`recommended`, a file or null, and `reason`, a sentence; None if there was no choice."""
    try:
        found = read_json(run_dir / CHOICE)
        file, reason = found["recommended"], found["reason"]
    except (UserError, KeyError):
        return None
    return {"recommended": None if file is None else str(file), "reason": str(reason)}
