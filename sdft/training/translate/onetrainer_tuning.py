"""Options of OneTrainer about what is trained: parts, ranks, layers, embeddings."""

from __future__ import annotations

from typing import Any

from sdft.errors import UserError
from sdft.training.translate.command_line import Command
from sdft.training.translate.kohya_network import meaningless
from sdft.training.translate.rules import Given, Rules

PARTS = ("unet", "text_encoder", "text_encoder_2")
METHODS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}
PRESETS = {"full": "conv", "attn-mlp": "all", "attn-only": "attention", "": "conv"}
"""layer_filter_preset -> tuning.layers."""


def tuned_parts(given: Given, command: Command) -> None:
    """Which parts train, until when, and at which rates. The rate of the first one is the optimizer's."""
    method, shared = given.text("training_method", "FINE_TUNE"), given.number("learning_rate", 3e-6)
    command.cited |= {"training_method", "learning_rate"} & set(given.values)
    if method == "EMBEDDING":
        command.set("tuning", "words", "training_method")
        command.set("optimizer.lr", given.number("embedding_learning_rate", shared), "embedding_learning_rate")
        return
    trained = [part for part in PARTS if given.flag(f"{part}.train", True)]
    command.cited |= {f"{part}.train" for part in PARTS} & set(given.values)
    if not trained:
        raise UserError(f"{given.source}: unet.train: is false, and so are those of the text encoders: nothing trains")
    rates = {part: given.number(f"{part}.learning_rate", shared) for part in trained}
    command.set("optimizer.lr", rates[trained[0]], *(f"{part}.learning_rate" for part in trained))
    scales = {part: round(rate / rates[trained[0]], 12) for part, rate in rates.items()}
    if method == "LORA":
        command.set("tuning", "lora_unet" if trained == ["unet"] else "lora_unet_te")
        if trained not in (["unet"], list(PARTS)):
            command.set("tuning.parts", trained)
        for part in trained[1:] if trained[0] == "unet" else trained:
            command.set(f"tuning.lr_scale.{part}", scales[part])
        for part in set(PARTS[1:]) - set(trained) if len(trained) > 1 or trained != ["unet"] else ():
            command.remove(f"tuning.lr_scale.{part}")
    else:
        command.set("tuning", "full")
        if trained != ["unet"]:
            command.set("tuning.parts", trained)
        if any(scale != 1 for scale in scales.values()):
            command.set("++tuning.lr_scale", {part: scale for part, scale in scales.items() if part != trained[0]})
    stops(trained, given, command)


def stop_of(part: str, given: Given) -> tuple[Any, str]:
    """When a part stops, with the unit; by default text encoders do so after 30 epochs."""
    after = given.number(f"{part}.stop_training_after")
    unit = given.text(f"{part}.stop_training_after_unit", "NEVER" if part == "unet" else "EPOCH")
    if after is None and part != "unet" and f"{part}.stop_training_after_unit" not in given:
        after = 30
    return after, unit


def epochs_of(given: Given) -> float:
    """Epochs of the run: nothing trains after the last part has stopped."""
    epochs = given.number("epochs", 100)
    if given.text("training_method", "FINE_TUNE") == "EMBEDDING":
        return epochs
    stops = (stop_of(part, given) for part in PARTS if given.flag(f"{part}.train", True))
    return min(epochs, max((after if unit == "EPOCH" and after else epochs) for after, unit in stops))


def stops(trained: list[str], given: Given, command: Command) -> None:
    """Parts that stop before the run does; the share of the epochs is that of the steps."""
    epochs, shares = epochs_of(given), {}
    for part in trained:
        keys = (f"{part}.stop_training_after", f"{part}.stop_training_after_unit")
        after, unit = stop_of(part, given)
        command.cited |= set(keys) & set(given.values)
        if unit == "EPOCH" and after and after < epochs:
            shares[part] = round(after / epochs, 6)
        elif unit not in ("NEVER", "EPOCH") and after:
            command.lack(keys[0], "tuning.stop_at={PART: SHARE} takes a share of the run's steps", f"{after} {unit}")
    if shares:
        command.set("tuning.stop_at", shares)


def adapter(given: Given, command: Command) -> None:
    """Rank, alpha, method and layers of a LoRA. OneTrainer's alpha is 1, and its first factor Kaiming's."""
    if given.text("training_method", "FINE_TUNE") != "LORA":
        return
    kind, rank = given.text("peft_type", "LORA"), given.number("lora_rank", 16)
    if kind == "LOKR" and "lokr_dim" in given:
        rank = given.number("lokr_dim")
        command.cited.add("lokr_dim")
    method = METHODS.get(kind, "lora")
    if kind not in METHODS:
        command.lack("peft_type", f"choose one of {', '.join(METHODS)}", kind)
    if given.flag("lora_decompose") and method == "lora":
        method = "dora"
        command.cited.add("lora_decompose")
    command.set("rank", rank, "lora_rank", "peft_type")
    command.set("tuning.method", method, "peft_type")
    command.set("tuning.alpha", given.number("lora_alpha", 1.0), "lora_alpha")
    if method in ("lora", "dora"):
        command.set("tuning.init", "kaiming")
    if method == "oft":
        command.differ(
            f"oft_block_size={given.get('oft_block_size', 32)}: blocks are counted in another way here; compare "
            "the number of parameters that dry_run=true prints",
            "oft_block_size",
        )
    if dropout := given.number("dropout_probability", 0):
        command.set("tuning.dropout", dropout, "dropout_probability")
    if given.text("lora_model_name", ""):
        command.set("tuning.start", given.text("lora_model_name"), "lora_model_name")
        command.overrides.pop("tuning.init", None)  # the file takes its place
    meaningless(method, {"dropout": "dropout_probability"}, command)
    layers(given, command)


def layers(given: Given, command: Command) -> None:
    preset, names = given.text("layer_filter_preset", "full"), given.text("layer_filter", "")
    filters = [name.strip() for name in names.split(",") if name.strip()]
    keys = ("layer_filter_preset", "layer_filter")
    if preset in PRESETS and (not filters or preset != "full"):
        command.set("tuning.layers", PRESETS[preset], *keys)
        if PRESETS[preset] == "conv":
            command.set("tuning.conv_rank", int(command.overrides["rank"] or 0))
            command.set("tuning.conv_alpha", given.number("lora_alpha", 1.0))
            command.differ("layer_filter_preset=full: also the first and last convolution and the time embedding there")
    elif given.flag("layer_filter_regex"):
        command.set("tuning.layers", "conv")
        command.lack(
            "layer_filter", "a regular expression there; tuning.include=[GLOB] takes globs of module names", names
        )
        command.cited |= {"layer_filter_regex", *keys}
    else:
        command.set("tuning.layers", "conv", *keys)
        encoders = [f"{part}.*" for part in PARTS[1:] if given.flag(f"{part}.train", True)]
        command.set("tuning.include", [*(f"unet.*{name}*" for name in filters), *encoders], *keys)


def embeddings(given: Given, command: Command) -> None:
    """New words, of textual inversion or beside other training."""
    method = given.text("training_method", "FINE_TUNE")
    words, vectors = {}, {}
    own = {key: given.get(f"embedding.{key}") for key in EMBEDDING}
    listed = ([own] if method == "EMBEDDING" else []) + [dict(item) for item in given.items("additional_embeddings")]
    for entry in listed:
        if entry.get("train") is False:
            command.lack("additional_embeddings", "only new words that train have a counterpart: tuning.new_words")
            continue
        word = str(entry.get("placeholder") or "<embedding>").strip("<>")
        words[word] = entry.get("initial_embedding_text") or "*"
        if (count := entry.get("token_count") or 1) > 1:
            vectors[word] = count
        if entry.get("model_name"):
            command.lack(
                "embedding.model_name", "a file to go on from: resume= continues a run of sdft", entry["model_name"]
            )
        if entry.get("placeholder", "").startswith("<"):
            command.differ(f"placeholder {entry['placeholder']}: the word is {word} here, in captions too")
    command.cited |= {f"embedding.{key}" for key in EMBEDDING if method == "EMBEDDING"} & set(given.values)
    if not words:
        return
    if method == "FINE_TUNE" or command.overrides["tuning"] == "lora_unet":
        command.lack("additional_embeddings", "new words go with tuning=words or lora_unet_te", ", ".join(words))
        return
    command.set("tuning.new_words", words, "additional_embeddings")
    if vectors:
        command.set("tuning.vectors", vectors)
    rate, main = given.number("embedding_learning_rate"), float(command.overrides["optimizer.lr"] or 1)
    if method == "LORA" and rate is not None:
        command.set("+tuning.lr_scale.words", rate / main, "embedding_learning_rate")


EMBEDDING = (
    "placeholder",
    "train",
    "token_count",
    "initial_embedding_text",
    "model_name",
    "uuid",
    "is_output_embedding",
    "stop_training_after",
    "stop_training_after_unit",
)
OF_PARTS = ("train", "learning_rate", "stop_training_after", "stop_training_after_unit")
TUNING_RULES: Rules = {
    tuned_parts: (
        "training_method",
        "learning_rate",
        "embedding_learning_rate",
        "epochs",
        *(f"{part}.{key}" for part in PARTS for key in OF_PARTS),
    ),
    adapter: (
        "peft_type",
        "lora_rank",
        "lora_alpha",
        "lora_decompose",
        "lokr_dim",
        "oft_block_size",
        "lora_model_name",
        "dropout_probability",
        "layer_filter",
        "layer_filter_preset",
        "layer_filter_regex",
    ),
    embeddings: ("additional_embeddings", *(f"embedding.{key}" for key in EMBEDDING)),
}
