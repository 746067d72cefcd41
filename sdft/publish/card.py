"""The model card: README.md of a model repository, with its YAML for the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import sdft
from sdft.publish.facts import Facts, data_of, figures_of, mapping, settings_of
from sdft.publish.usage import SDXL, programs, python

IMAGES = "images"
SDXL_LICENSE = "openrail++"
PROJECT = "sdft"


def license_of(facts: Facts) -> str:
    """The licence of the base, which what is trained on it inherits, as the Hub names it."""
    return "apache-2.0" if facts.is_nano else SDXL_LICENSE


def card(
    facts: Facts, title: str, options: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], shown: str
) -> str:
    """The text of README.md.

    title: of the repository and its files. options: `to`, `license`, `description` of the command. pictures: entries of
    the images in `images/`. shown: of which weights they are.
    """
    license = options.get("license") or license_of(facts)
    sections = [
        f"# {title}",
        "<Gallery />" if pictures else "",
        options.get("description") or sentence(facts),
        before_after(facts),
        "## What it is\n\n" + "\n".join(f"- {line}" for line in about(facts)),
        "## How to use it\n\n" + trigger(facts) + python(facts, title, options.get("to")),
        programs(facts, title),
        measured(facts),
        *([data] if (data := paragraph("## Training images", data_of(facts))) else []),
        "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in settings_of(facts)),
        "## How it was made\n\n" + made(facts),
        gallery(pictures, shown),
        "## Licence\n\n" + licence(facts, license),
    ]
    front = front_matter(facts, license, pictures)
    return f"---\n{front}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def front_matter(facts: Facts, license: str, pictures: Sequence[Mapping[str, Any]]) -> str:
    """The YAML that the Hub reads."""
    kinds = {"adapter": ["lora"], "words": ["textual-inversion"], "model": []}[facts.kind]
    family = [] if facts.is_nano else ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    data = ModelCardData(
        license=license,
        base_model=facts.base,
        base_model_relation=None if facts.base is None else ("finetune" if facts.kind == "model" else "adapter"),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *kinds, *family, PROJECT],
        instance_prompt=facts.trigger,
        widget=[
            {
                "text": entry["prompt"],
                **({"parameters": {"negative_prompt": entry["negative"]}} if entry.get("negative") else {}),
                "output": {"url": f"{IMAGES}/{Path(entry['path']).name}"},
            }
            for entry in pictures
        ]
        or None,
    )
    return data.to_yaml().strip()


def what(facts: Facts) -> str:
    """What kind of weights these are."""
    if facts.kind == "words":
        return "Embeddings of new words (textual inversion)"
    if facts.kind == "model":
        return "A fine-tuned model"
    return f"A {facts.method}" + (" with the embeddings of new words" if facts.words is not None else "")


def sentence(facts: Facts) -> str:
    """The first sentence of a card."""
    name = "nano, the small test model of sdft" if facts.is_nano else facts.base_name
    return f"{what(facts)} for {name}, trained with sdft."


def about(facts: Facts) -> list[str]:
    """What it is, in points."""
    found = [f"{what(facts)}. Base model: {linked(facts)}."]
    starts = mapping(facts.receipt.get("starts_from"))
    for one in starts.get("baked") or ():
        found.append(f"The base had the LoRA {Path(str(one.get('lora'))).name} baked in at {one.get('scale')}.")
    if starts.get("merged"):
        found.append("The base is a merge of several models.")
    if facts.predicts_v:
        found.append("It predicts v, not the noise: programs must be told so (below).")
    if facts.is_nano:
        found.append("nano draws images of 128 x 128 pixels. Its LoRAs do not fit SDXL.")
    return found


def linked(facts: Facts) -> str:
    if facts.base is not None:
        return f"[{facts.base}](https://huggingface.co/{facts.base})"
    return "nano, which is part of sdft" if facts.is_nano else f"`{facts.base_name}`, a file of SDXL's architecture"


def trigger(facts: Facts) -> str:
    """How to ask for what was learned."""
    if facts.words is not None:
        words = ", ".join(f"`{word}`" for word in facts.words.vectors)
        plural = "Trigger words" if len(facts.words.vectors) > 1 else "Trigger word"
        return f"{plural}: {words}, as in `{facts.example}`.\n\n"
    if facts.trigger:
        return f"Trigger: `{facts.trigger}`, as in `{facts.example}`.\n\n"
    return "No trigger word: it acts on every prompt.\n\n"


def measured(facts: Facts) -> str:
    """The verdict of the run."""
    lines = figures_of(facts)
    found = "\n".join(f"- {line}" for line in lines) or "Nothing was measured after training; judge by the images."
    when = "At the end of the run"
    if facts.chosen is not None:
        strength = f", at strength {facts.chosen['strength']:g}" if facts.kind == "adapter" else ""
        when = f"At step {facts.chosen['step']} of {facts.summary.get('num_steps')}{strength}"
    return f"## What was measured\n\n{when}, against the base model, with the same prompts and seeds:\n\n{found}"


def before_after(facts: Facts) -> str:
    if not facts.comparison.is_file():
        return ""
    shown = "the base model above, these weights below"
    if facts.chosen is not None:
        step, strength = facts.chosen["step"], facts.chosen["strength"]
        shown = f"the base model above, checkpoints at strengths below; these weights are the row {step} x {strength:g}"
    return f"![The same prompts and seeds: {shown}]({IMAGES}/{facts.comparison.name})"


def gallery(pictures: Sequence[Mapping[str, Any]], shown: str) -> str:
    """The prompts of the images, as a list."""
    if not pictures:
        return ""
    lines = []
    for entry in pictures:
        sampler = mapping(entry.get("sampler"))
        h, w = entry["size"] if isinstance(entry.get("size"), list) and len(entry["size"]) == 2 else ("?", "?")
        told = [f"seed {entry.get('seed')}", f"{w} x {h}"]
        told += [f"{sampler.get('name')}, {sampler.get('steps')} steps, CFG {sampler.get('cfg')}"] if sampler else []
        told += (
            [f"negative prompt {json.dumps(entry['negative'], ensure_ascii=False)}"] if entry.get("negative") else []
        )
        told += [f"strength {entry['strength']}"] if "strength" in entry else []
        for lora in entry.get("loras") or ():
            told.append(f"with {Path(str(lora.get('lora'))).name} at {lora.get('strength')}")
        lines.append(f"- [{entry['prompt']}]({IMAGES}/{Path(entry['path']).name}): {', '.join(told)}")
    return f"## Images\n\nOf {shown}, not selected:\n\n" + "\n".join(lines)


def made(facts: Facts) -> str:
    """How the run can be repeated."""
    git, versions = mapping(facts.receipt.get("git")), mapping(facts.receipt.get("versions"))
    used = [f"{name} {versions[name]}" for name in ("torch", "diffusers", "peft", "transformers") if name in versions]
    tools = f" ({', '.join(used)})" if used else ""
    commit = f" at commit `{git['commit'][:12]}`" if isinstance(git.get("commit"), str) else ""
    changed = " with local changes" if git.get("dirty") else ""
    lines = [
        f"Trained with sdft {sdft.__version__}{commit}{changed}{tools}. All that is random in the run follows "
        "from its seed. Its receipt lists the config, the code, the versions, and hashes of the images and of the base "
        "weights; with it and the same images, `python train.py reproduce=receipt.json` trains again and compares all "
        "weights.",
        "",
        f"- SHA-256 of the receipt: `{facts.sha256}`",
    ]
    for name, label in (("data", "images and captions"), ("base_weights", "base weights")):
        if isinstance(facts.receipt.get(name), str):
            lines.append(f"- SHA-256 of the {label}: `{facts.receipt[name]}`")
    return "\n".join(lines)


def licence(facts: Facts, license: str) -> str:
    if license == SDXL_LICENSE and not facts.is_nano:
        return (
            f"{license}, the licence of SDXL, which what is derived from it inherits: "
            f"[CreativeML Open RAIL++-M](https://huggingface.co/{SDXL}/blob/main/LICENSE.md). Its restrictions of use "
            "apply."
        )
    return f"{license}."


def paragraph(head: str, lines: Sequence[str]) -> str:
    return f"{head}\n\n" + " ".join(lines) if lines else ""
