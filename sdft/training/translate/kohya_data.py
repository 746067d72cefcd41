"""Options of kohya's sd-scripts about images and captions."""

from __future__ import annotations

import math
from typing import Any

from sdft.errors import UserError
from sdft.training.translate.command_line import Command, Raw
from sdft.training.translate.kohya_files import Subset, subsets_in
from sdft.training.translate.rules import Given, Rules, as_number, typed

FOLDER = "sdft.data.sources.Folder"
TAGS = "sdft.data.captions.Tags"


def images(given: Given, command: Command) -> None:
    """The folders of images: one is data=folder, several, or regularisation images, are data=mix."""
    subsets = list(given.context.subsets)
    command.cited |= {"config_file", *(["dataset_config"] if subsets else [])}
    if "dataset_config" in given and not subsets:
        command.lack(
            "dataset_config",
            "is not beside this file: its folders and settings are missing here",
            given.get("dataset_config"),
        )
    if not subsets and "train_data_dir" in given:
        folder = given.text("train_data_dir")
        subsets = subsets_in(folder, given.context.folder)
        if not subsets:
            command.differ(
                f"train_data_dir={folder}: is not on this machine; for its subfolders N_NAME, epochs count "
                "N times there, and NAME is the caption of images without one (default_caption=NAME)"
            )
            subsets = [Subset(folder)]
    if not subsets:
        command.lack("train_data_dir", "no folder of images is named: set data=folder data.root=DIR")
        return
    regularisation = [subset for subset in subsets if subset.is_reg]
    if "reg_data_dir" in given and not regularisation:
        folder = given.text("reg_data_dir")
        regularisation = subsets_in(folder, given.context.folder, is_reg=True) or [Subset(folder, is_reg=True)]
    own = [subset for subset in subsets if not subset.is_reg]
    command.cited |= {"train_data_dir", "reg_data_dir", "prior_loss_weight"} & set(given.values)
    for key, values in (given.context.mixed or {}).items():
        if key != "resolution":
            command.differ(f"{key}: {', '.join(map(str, values))} in parts of the data set; one value for all here")
    if len(own) == 1 and not regularisation:
        one_folder(own[0], given, command)
    else:
        mix(own, regularisation, given, command)


def one_folder(subset: Subset, given: Given, command: Command) -> None:
    command.set("data", "folder")
    command.set("data.root", subset.folder)
    if subset.caption:
        command.set("default_caption", subset.caption)
    epochs = given.number("max_train_epochs")
    if subset.repeats > 1 and epochs is not None:
        command.set("epochs", epochs * subset.repeats)
        command.differ(f"{subset.repeats} repeats: epochs={epochs * subset.repeats} are the {epochs} there")


def mix(own: list[Subset], regularisation: list[Subset], given: Given, command: Command) -> None:
    """Several folders; regularisation images are read as often as all others, as there."""
    command.set("data", "mix")
    names = [("own", own[0]), *((f"own_{n}", subset) for n, subset in enumerate(own[1:], 2))]
    names += [("others" + f"_{n}" * (n > 1), subset) for n, subset in enumerate(regularisation, 1)]
    if not regularisation:
        command.remove("data.train.sources.others")
    for name, subset in names:
        if name in ("own", "others"):
            command.set(f"data.train.sources.{name}.root", subset.folder)
            if subset.caption:
                command.set(f"data.train.sources.{name}.default_caption", subset.caption)
        else:
            node = {"_target_": FOLDER, "root": subset.folder, "split": "all" if subset.is_reg else "train"}
            template = {} if subset.is_reg else {"caption": Raw("${caption}")}
            command.set(f"+data.train.sources.{name}", {**node, **template, "default_caption": subset.caption})
        if subset.is_reg and (weight := given.number("prior_loss_weight", 1)) != 1:
            plus = "" if name == "others" else "+"
            command.set(f"{plus}data.train.sources.{name}.loss_weight", weight, "prior_loss_weight")
    if len(names) == 2 and regularisation:
        command.set("data.train.weights", {"own": 1, "others": 1})
        command.differ(
            "regularisation images: as many as own images and their repeats there; data.train.weights has "
            "as many of both, and epochs count passes over both"
        )
    else:
        command.set("data.train.repeats", {name: subset.repeats for name, subset in names})


def captions(given: Given, command: Command) -> None:
    """Templates, tags and dropout of captions. Ours is 0.1 by default, kohya's 0."""
    command.set("data.caption_dropout", given.number("caption_dropout_rate", 0), "caption_dropout_rate")
    prefix, suffix = (
        given.text(f"caption_{end}", "").replace("{", "{{").replace("}", "}}") for end in ("prefix", "suffix")
    )
    if prefix or suffix:
        command.set(
            "caption",
            " ".join(part for part in (prefix, "{caption}", suffix) if part),
            "caption_prefix",
            "caption_suffix",
        )
    extension = given.text("caption_extension", "") or given.text("caption_extention", "")
    if extension not in ("", ".txt", ".caption"):
        command.lack("caption_extension", "captions are in .txt or .caption files here; rename them", extension)
    tags: dict[str, Any] = {}
    if given.flag("shuffle_caption"):
        tags["shuffle"] = True
    if drop := given.number("caption_tag_dropout_rate", 0):
        tags["drop"] = drop
    if tags and given.number("keep_tokens", 0):
        tags["keep_first"] = given.number("keep_tokens")
    if tags and given.text("caption_separator", ",") != ",":
        tags["separator"] = given.text("caption_separator")
    command.cited |= {"shuffle_caption", "caption_tag_dropout_rate", "keep_tokens", "caption_separator"} & set(
        given.values if tags else ()
    )
    set_tags(tags, command)


def set_tags(tags: dict[str, Any], command: Command) -> None:
    if not tags:
        return
    if command.overrides.get("data") == "mix":
        own = {
            option.split(".")[3]
            for option in command.overrides
            if option.lstrip("+").startswith("data.train.sources.own")
        }
        for name in sorted(own):
            command.set(f"+data.train.sources.{name}.tags", {"_target_": TAGS, **tags})
        return
    for name, value in tags.items():
        command.set(f"{'+' if name == 'separator' else ''}data.tags.{name}", value)


def sizes(given: Given, command: Command) -> None:
    """Resolution and buckets. Squares without enable_bucket, as there."""
    found = (given.context.mixed or {}).get("resolution") or (
        [given.get("resolution")] if "resolution" in given else []
    )
    sides = {side_of(value, given, command) for value in found}
    if len(sides) == 1:
        command.set("size", sides.pop(), "resolution")
    elif sides:
        command.set("size", max(sides), "resolution")
        command.set("data.sizes", dict.fromkeys(sorted(sides), 1), "resolution")
    bucketed = given.flag("enable_bucket")
    step = given.number("bucket_reso_steps", 64) if bucketed else None
    command.set("data.bucket_step", step, "enable_bucket", "bucket_reso_steps")
    if bucketed and given.flag("bucket_no_upscale"):
        command.set("data.no_upscale", True, "bucket_no_upscale")
    for key in ("min_bucket_reso", "max_bucket_reso"):
        if key in given and bucketed:
            command.lack(key, "buckets have sides of half to twice the size here", given.get(key))


def side_of(value: Any, given: Given, command: Command) -> int:
    """The side of the square with the area of a resolution, `1024`, `1024,1024` or [768, 1344]."""
    parts = list(value) if isinstance(value, list | tuple) else str(value).split(",")
    numbers = [as_number(typed(str(part).strip()), f"{given.source}: resolution") for part in parts]
    if len(numbers) > 2 or min(numbers) <= 0:
        raise UserError(f"{given.source}: resolution={value}: must be one number or two")
    if len(set(numbers)) == 1:
        return int(numbers[0])
    side = square_side(numbers)
    command.differ(f"resolution={value}: training sizes have one area here, {side}^2, and with buckets all shapes")
    return side


def square_side(numbers: list[float]) -> int:
    """The side of the square with the area of a rectangle, to a multiple of 64."""
    return max(64, round(math.sqrt(numbers[0] * numbers[1]) / 64) * 64)


def augmentation(given: Given, command: Command) -> None:
    if given.flag("flip_aug"):
        command.set("data.flip", True, "flip_aug")
        command.differ("flip_aug: images whose captions say left or right are not flipped here")
    if given.flag("random_crop"):
        command.set("data.crop", "random", "random_crop")
    if given.flag("color_aug"):
        command.set("data.augmentation.hue", 0.02, "color_aug")
        command.set("data.augmentation.saturation", 0.1, "color_aug")
        command.differ("color_aug: a small change of hue and gamma there; data.augmentation has hue and saturation")


def caching(given: Given, command: Command) -> None:
    """Latents are encoded at every visit there unless they are cached; ours are cached by default."""
    on_disk, in_memory = given.flag("cache_latents_to_disk"), given.flag("cache_latents")
    command.set(
        "data.cache", "disk" if on_disk else "ram" if in_memory else "off", "cache_latents", "cache_latents_to_disk"
    )
    if (on_disk or in_memory) and (given.flag("random_crop") or given.flag("color_aug")):
        command.set("data.variants", 4)
    if given.flag("cache_text_encoder_outputs") or given.flag("cache_text_encoder_outputs_to_disk"):
        command.differ(
            "cache_text_encoder_outputs: prompts are always cached here if no text encoder trains",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
        )


def masks(given: Given, command: Command) -> None:
    """kohya multiplies the error by the mask, and divides by the whole area."""
    if not given.flag("masked_loss") and not given.flag("alpha_mask"):
        return
    command.set("data.masks", "alpha" if given.flag("alpha_mask") else True, "masked_loss", "alpha_mask")
    command.set("objective.normalise_mask", False)
    if "conditioning_data_dir" in given:
        command.lack(
            "conditioning_data_dir",
            "a mask is beside its image here, cat.mask.png beside cat.jpg",
            given.get("conditioning_data_dir"),
        )


def prompt_length(given: Given, command: Command) -> None:
    if tokens := given.number("max_token_length", 0):
        command.set("model.prompt_chunks", max(1, int(tokens) // 75), "max_token_length")


DATA_RULES: Rules = {
    images: (
        "train_data_dir",
        "reg_data_dir",
        "dataset_config",
        "config_file",
        "prior_loss_weight",
        "max_train_epochs",
        "image_dir",
        "num_repeats",
        "class_tokens",
        "is_reg",
    ),
    captions: (
        "caption_dropout_rate",
        "caption_prefix",
        "caption_suffix",
        "caption_extension",
        "caption_extention",
        "shuffle_caption",
        "caption_tag_dropout_rate",
        "keep_tokens",
        "caption_separator",
    ),
    sizes: (
        "resolution",
        "enable_bucket",
        "bucket_reso_steps",
        "bucket_no_upscale",
        "min_bucket_reso",
        "max_bucket_reso",
    ),
    augmentation: ("flip_aug", "random_crop", "color_aug"),
    caching: (
        "cache_latents",
        "cache_latents_to_disk",
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
    ),
    masks: ("masked_loss", "alpha_mask", "conditioning_data_dir"),
    prompt_length: ("max_token_length",),
}
