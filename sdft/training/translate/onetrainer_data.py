"""Concepts and sizes of OneTrainer: images and captions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdft.errors import UserError, did_you_mean
from sdft.training.translate.command_line import Command, Raw
from sdft.training.translate.kohya_data import FOLDER, set_tags, square_side
from sdft.training.translate.kohya_files import found, text_of
from sdft.training.translate.rules import OFF, Given, Rules, as_number

SAMPLERS = {
    "DDIM": "ddim",
    "EULER": "euler",
    "EULER_A": "euler_a",
    "DPMPP": "dpmpp_2m",
    "DPMPP_KARRAS": "dpmpp_2m_karras",
    "DPMPP_SDE": "dpmpp_2m_sde",
    "DPMPP_SDE_KARRAS": "dpmpp_2m_sde_karras",
    "UNIPC": "unipc",
}
"""noise_scheduler of a sample -> sampler."""
COLOURS = ("brightness", "contrast", "saturation", "hue")
IN_CONCEPT = {
    "": (
        "name",
        "path",
        "seed",
        "enabled",
        "type",
        "validation_concept",
        "include_subdirectories",
        "balancing",
        "repeats",
        "balancing_strategy",
        "loss_weight",
        "image",
        "text",
        "image_variations",
        "text_variations",
        "concept_stats",
        "__version",
    ),
    "image.": (
        "enable_crop_jitter",
        "enable_random_flip",
        "enable_random_rotate",
        "random_rotate_max_angle",
        "enable_resolution_override",
        "resolution_override",
        "__version",
        *(f"enable_random_{colour}" for colour in COLOURS),
        *(f"random_{colour}_max_strength" for colour in COLOURS),
    ),
    "text.": (
        "prompt_source",
        "enable_tag_shuffling",
        "keep_tags_count",
        "tag_delimiter",
        "tag_dropout_enable",
        "tag_dropout_probability",
        "__version",
    ),
}
"""Keys of a concept that are read; the others have no counterpart."""
LACKING = {
    "image.": (
        "enable_fixed_flip",
        "enable_fixed_rotate",
        "enable_random_circular_mask_shrink",
        "enable_random_mask_rotate_crop",
        *(f"enable_fixed_{colour}" for colour in COLOURS),
    ),
    "text.": (
        "prompt_path",
        "tag_dropout_mode",
        "tag_dropout_special_tags_mode",
        "tag_dropout_special_tags",
        "tag_dropout_special_tags_regex",
        "caps_randomize_enable",
        "caps_randomize_probability",
        "caps_randomize_mode",
        "caps_randomize_lowercase",
    ),
}


def concepts(given: Given, command: Command) -> None:
    """Concepts as sources of images: one is data=folder, several are data=mix."""
    entries = [entry for entry in concept_list(given, command) if entry.get("enabled", True)]
    validation = [e for e in entries if e.get("type") == "VALIDATION" or e.get("validation_concept")]
    prior = [e for e in entries if e.get("type") == "PRIOR_PREDICTION"]
    own = [e for e in entries if e not in validation and e not in prior]
    for entry in validation:
        command.lack(
            f"concept {entry.get('name') or entry.get('path')}", "a share of the images is held out here, data.held_out"
        )
    for entry in prior:
        command.lack(
            f"concept {entry.get('name') or entry.get('path')}",
            "prior prediction without images here: "
            "objective/prior=prediction objective.prior.caption='a photo of a CLASS'",
        )
    for entry in entries:
        if not entry.get("path"):
            raise UserError(f"{given.source}: concepts: one has no path")
    if len(own) == 1:
        command.set("data", "folder")
        command.set("data.root", own[0]["path"])
        if own[0].get("loss_weight", 1) != 1:
            command.differ(f"loss_weight={own[0]['loss_weight']} of the only concept: scale the learning rate instead")
        repeats = counted_repeats(own[0], command)
        if repeats != 1:
            epochs = as_number(command.overrides["epochs"], "epochs") * repeats
            command.set("epochs", int(epochs) if epochs == int(epochs) else epochs)
            command.differ(f"balancing={repeats:g}: epochs={epochs:g} are those there times the repeats")
    elif own:
        mix(own, command)
    if own:
        augmentation(own[0], own, given, command)
        texts(own[0], own, command)


def concept_list(given: Given, command: Command) -> list[dict[str, Any]]:
    """The concepts in the config, or in the file that it names."""
    if given.items("concepts"):
        command.cited |= {"concepts", "concept_file_name"} & set(given.values)
        entries = given.items("concepts")
    else:
        name = given.text("concept_file_name", "training_concepts/concepts.json")
        file = found(name, given.context)
        if file is None:
            command.lack("concept_file_name", "the file is not here: set data=folder data.root=DIR", name)
            return []
        command.cited.add("concept_file_name")
        entries = json.loads(text_of(file, given.source, "concept_file_name"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{given.source}: concepts: must be a list of objects")
    return entries


def counted_repeats(entry: dict[str, Any], command: Command) -> float:
    """How often each image of a concept is read in an epoch."""
    number = as_number(entry.get("balancing", entry.get("repeats", 1)), "balancing")
    if entry.get("balancing_strategy", "REPEATS") == "SAMPLES":
        command.differ(
            f"balancing_strategy=SAMPLES: {number:g} images of {entry['path']} an epoch there, all of them here"
        )
        return 1
    return number


def mix(own: list[dict[str, Any]], command: Command) -> None:
    command.set("data", "mix")
    names = ["own", *(f"own_{n}" for n in range(2, len(own) + 1))]
    command.remove("data.train.sources.others")
    for name, entry in zip(names, own, strict=True):
        weight = entry.get("loss_weight", 1)
        if name == "own":
            command.set("data.train.sources.own.root", entry["path"])
            if weight != 1:
                command.set("data.train.sources.own.loss_weight", weight)
        else:
            node = {
                "_target_": FOLDER,
                "root": entry["path"],
                "split": "train",
                "caption": Raw("${caption}"),
                "default_caption": Raw("${default_caption}"),
            }
            command.set(f"+data.train.sources.{name}", {**node, **({"loss_weight": weight} if weight != 1 else {})})
    repeats = {name: counted_repeats(entry, command) for name, entry in zip(names, own, strict=True)}
    if any(number != round(number) or number < 1 for number in repeats.values()):
        command.differ(f"balancing {list(repeats.values())}: data.train.repeats are whole numbers of at least 1")
    command.set("data.train.repeats", {name: max(1, round(number)) for name, number in repeats.items()})


def augmentation(first: dict[str, Any], own: list[dict[str, Any]], given: Given, command: Command) -> None:
    """Changes of images; those of the first concept are those of all here."""
    image = first.get("image") or {}
    if any((entry.get("image") or {}) != image for entry in own):
        command.differ("concepts.image: augmentation differs between concepts; that of the first is taken for all")
    if image.get("enable_random_flip", True):
        command.set("data.flip", True)
        command.differ("enable_random_flip: images whose captions say left or right are not flipped here")
    if image.get("enable_crop_jitter", True):
        command.set("data.crop", "random")
    if image.get("enable_random_rotate") and image.get("random_rotate_max_angle"):
        command.set("data.augmentation.rotation", image["random_rotate_max_angle"])
    for colour in COLOURS:
        if image.get(f"enable_random_{colour}") and (strength := image.get(f"random_{colour}_max_strength")):
            command.set(f"data.augmentation.{colour}", strength)
    if image.get("enable_resolution_override"):
        command.lack(
            "image.resolution_override", "sizes are of all images here: data.sizes", image.get("resolution_override")
        )
    changes = {"data.crop", "data.augmentation.rotation", *(f"data.augmentation.{colour}" for colour in COLOURS)}
    if changes & command.overrides.keys() and given.flag("image_caching", True):
        command.set("data.variants", max(1, int(first.get("image_variations", 1))))


def texts(first: dict[str, Any], own: list[dict[str, Any]], command: Command) -> None:
    """Captions: from text files, or from the names of files."""
    text = first.get("text") or {}
    if any((entry.get("text") or {}) != text for entry in own):
        command.differ(
            "concepts.text: settings of captions differ between concepts; those of the first are taken for all"
        )
    if (source := text.get("prompt_source", "sample")) != "sample":
        command.lack(
            "text.prompt_source",
            "captions are in text files beside the images: python -m sdft.data caption "
            "writes them, caption='TEXT' is one for all",
            source,
        )
    tags: dict[str, Any] = {}
    if text.get("enable_tag_shuffling"):
        tags["shuffle"] = True
    if text.get("tag_dropout_enable") and text.get("tag_dropout_probability"):
        tags["drop"] = text["tag_dropout_probability"]
    if tags and text.get("keep_tags_count", 1):
        tags["keep_first"] = text.get("keep_tags_count", 1)
    if tags and text.get("tag_delimiter", ",") != ",":
        tags["separator"] = text["tag_delimiter"]
    set_tags(tags, command)
    for entry in own:
        for prefix, keys in IN_CONCEPT.items():
            found_keys = (entry.get(prefix[:-1]) or {}) if prefix else entry
            for key, value in found_keys.items():
                if key in keys or (key in LACKING.get(prefix, ()) and value in (*OFF, "FULL", "NONE")):
                    continue
                if key in LACKING.get(prefix, ()):
                    if not key.startswith("caps_randomize_m"):
                        command.lack(f"concepts.{prefix}{key}", "has no counterpart here", value)
                else:
                    command.unknown[f"concepts.{prefix}{key}"] = did_you_mean(key, (*keys, *LACKING.get(prefix, ())))


def captions(given: Given, command: Command) -> None:
    """Caption dropout of each encoder by itself, as there; none by default."""
    rates = [given.number(f"{part}.dropout_probability", 0) for part in ("text_encoder", "text_encoder_2")]
    command.set("data.caption_dropout", 0)
    if any(rates):
        command.set(
            "data.encoder_dropout", rates, "text_encoder.dropout_probability", "text_encoder_2.dropout_probability"
        )


def sizes(given: Given, command: Command) -> None:
    """One resolution or several, `512,768,1024`; buckets by default."""
    sides = set()
    for item in str(given.get("resolution", "512")).split(","):
        numbers = [as_number(part.strip(), f"{given.source}: resolution") for part in item.split("x")]
        if len(numbers) == 2:
            command.differ(f"resolution={item.strip()}: training sizes have one area and the shapes of the images here")
        sides.add(square_side(numbers) if len(numbers) == 2 else int(numbers[0]))
    command.set("size", max(sides), "resolution")
    if len(sides) > 1:
        command.set("data.sizes", dict.fromkeys(sorted(sides), 1), "resolution")
    command.set(
        "data.bucket_step", 64 if given.flag("aspect_ratio_bucketing", True) else None, "aspect_ratio_bucketing"
    )


def caching(given: Given, command: Command) -> None:
    if given.flag("image_caching", True):
        command.set("data.cache", "disk", "image_caching", "text_caching")
        if given.text("cache_dir", ""):
            command.set("data.cache_dir", given.text("cache_dir"), "cache_dir")
    else:
        command.set("data.cache", "off", "image_caching", "text_caching")


def samples(given: Given, command: Command) -> None:
    """Prompts of previews."""
    entries = given.items("samples")
    if not entries:
        file = found(given.text("sample_definition_file_name", "training_samples/samples.json"), given.context)
        entries = json.loads(text_of(file, given.source, "sample_definition_file_name")) if file else []
    prompts = [prompt_of(entry) for entry in entries if entry.get("enabled", True) and entry.get("prompt")]
    keys = [key for key in ("samples", "sample_definition_file_name") if key in given]
    if prompts:
        command.set("prompts", [prompt["prompt"] for prompt in prompts], *keys)
        if any(len(prompt) > 1 for prompt in prompts):
            previews = [prompt if len(prompt) > 1 else prompt["prompt"] for prompt in prompts]
            command.set("callbacks.previews.prompts", previews, *keys)
    elif "sample_definition_file_name" in given:
        command.lack(
            "sample_definition_file_name", "give its prompts as prompts=[...]", given.get("sample_definition_file_name")
        )


def prompt_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `samples` as one of callbacks.previews.prompts."""
    found: dict[str, Any] = {"prompt": entry["prompt"]}
    if "height" in entry and "width" in entry:
        found["size"] = [entry["height"], entry["width"]]
    if "seed" in entry and not entry.get("random_seed"):
        found["seed"] = entry["seed"]
    same = {"diffusion_steps": "steps", "cfg_scale": "cfg", "negative_prompt": "negative"}
    found |= {ours: entry[theirs] for theirs, ours in same.items() if entry.get(theirs)}
    if sampler := SAMPLERS.get(str(entry.get("noise_scheduler", ""))):
        found["sampler"] = sampler
    return found


CONCEPT_RULES: Rules = {
    concepts: ("concepts", "concept_file_name"),
    captions: ("text_encoder.dropout_probability", "text_encoder_2.dropout_probability"),
    sizes: ("resolution", "aspect_ratio_bucketing"),
    caching: ("image_caching", "text_caching", "cache_dir"),
    samples: ("samples", "sample_definition_file_name"),
}
