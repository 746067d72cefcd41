"""Options of kohya's sd-scripts about what is trained: networks, ranks, rates of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdft.errors import UserError
from sdft.training.translate.command_line import Command
from sdft.training.translate.rules import OFF, Given, Rules, as_number, typed

ENCODERS = ("text_encoder", "text_encoder_2")
ALGORITHMS = {
    "lora": "lora",
    "locon": "lora",
    "dora": "dora",
    "loha": "loha",
    "lokr": "lokr",
    "diag-oft": "oft",
    "boft": "boft",
}
MODULES = {
    "networks.lora": "lora",
    "networks.lora_fa": "lora",
    "networks.dylora": "lora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
    "networks.oft": "oft",
    "lycoris.kohya": None,
}
PRESETS = {"attn-mlp": "all", "attn-only": "attention", "full": "conv", "unet-transformer-only": "all"}
"""Presets of LyCORIS -> tuning.layers."""
NAMES = {
    "max_norm": "scale_weight_norms",
    "dropout": "network_dropout",
    "rank_dropout": "network_args.rank_dropout",
    "module_dropout": "network_args.module_dropout",
    "rslora": "network_args.rs_lora",
    "lora_plus": "network_args.loraplus_lr_ratio",
}
"""Options of `tuning` -> where they come from."""
BY_PART = "rates are by part here; tuning.exclude leaves blocks out, tuning.rank_pattern sets their ranks"
NETWORK_ARGS = {
    "algo": "",
    "preset": "",
    "conv_dim": "",
    "conv_alpha": "",
    "dropout": "",
    "rank_dropout": "",
    "module_dropout": "",
    "dora_wd": "",
    "train_norm": "",
    "rs_lora": "",
    "loraplus_lr_ratio": "",
    "loraplus_unet_lr_ratio": "",
    "loraplus_text_encoder_lr_ratio": "",
    "block_dims": "ranks by block are tuning.rank_pattern={GLOB: RANK} here, by module name",
    "block_alphas": "alphas by block are tuning.alpha_pattern={GLOB: ALPHA} here, by module name",
    "conv_block_dims": "ranks by block are tuning.rank_pattern={GLOB: RANK} here, by module name",
    "conv_block_alphas": "alphas by block are tuning.alpha_pattern={GLOB: ALPHA} here, by module name",
    "down_lr_weight": BY_PART,
    "mid_lr_weight": BY_PART,
    "up_lr_weight": BY_PART,
    "block_lr_zero_threshold": "tuning.exclude=[GLOB] leaves blocks out",
    "exclude_patterns": "regular expressions there; tuning.exclude=[GLOB] takes globs of module names",
    "include_patterns": "regular expressions there; tuning.include=[GLOB] takes globs of module names",
    "network_reg_dims": "regular expressions there; tuning.rank_pattern={GLOB: RANK} takes globs of module names",
    "network_reg_lrs": "rates are by part here: tuning.lr_scale",
    "factor": "LoKr chooses its factors by the rank here",
    "decompose_both": "LoKr decomposes the larger factor here",
    "full_matrix": "LoKr decomposes the larger factor here; a high rank leaves it whole",
    "unbalanced_factorization": "LoKr chooses its factors by the rank here",
    "use_tucker": "convolutions are decomposed as in plain LoCon here",
    "use_cp": "convolutions are decomposed as in plain LoCon here",
    "use_conv_cp": "convolutions are decomposed as in plain LoCon here",
    "disable_conv_cp": "",
    "use_scalar": "no learned scale here; tuning.alpha is fixed",
    "bypass_mode": "adapters are always computed beside the layer here",
    "rank_dropout_scale": "the rest is scaled up here, always",
    "wd_on_output": "DoRA normalises as in the paper here",
    "block_size": "see tuning.rank of tuning.method=oft",
    "constraint": "no bound on the rotation here",
    "rescaled": "no rescaled rotation here",
    "unit": "DyLoRA has no counterpart: sweep rank=4,8,16 with -m",
    "no_dim_warn": "",
    "verbose": "",
    "enable_conv": "tuning.layers=conv",
    "enable_all_linear": "tuning.layers=all",
}
"""Keys of `--network_args` -> why they have no option; empty for those with one, or without an effect."""


def tuned_parts(given: Given, command: Command) -> None:
    """Which parts train, and at which rates. The rate of the first part is the optimizer's."""
    kind = given.context.script
    if kind == "sdxl_train_textual_inversion.py":
        words(given, command)
    elif kind == "sdxl_train.py":
        full(given, command)
    else:
        adapters(given, command)


def words(given: Given, command: Command) -> None:
    token = given.text("token_string", "")
    if not token:
        raise UserError(f"{given.source}: token_string: is missing; textual inversion learns a word")
    command.set("tuning", "words")
    command.set("tuning.new_words", {token: given.text("init_word", token)}, "token_string", "init_word")
    if (count := given.number("num_vectors_per_token", 1)) > 1:
        command.set("tuning.vectors", {token: count}, "num_vectors_per_token")
    command.set("optimizer.lr", given.number("learning_rate", 2e-6), "learning_rate")


def full(given: Given, command: Command) -> None:
    rate = given.number("learning_rate", 2e-6)
    command.set("tuning", "full")
    command.set("optimizer.lr", rate, "learning_rate")
    rates = {}
    if given.flag("train_text_encoder"):
        for part, key in zip(ENCODERS, ("learning_rate_te1", "learning_rate_te2"), strict=True):
            if (own := given.number(key, rate)) > 0:
                rates[part] = own / rate
                command.cited.add(key)
        command.set("tuning.parts", ["unet", *rates], "train_text_encoder")
    if any(scale != 1 for scale in rates.values()):
        command.set("++tuning.lr_scale", rates)


def adapters(given: Given, command: Command) -> None:
    """A network on the UNet, the text encoders, or both."""
    shared = given.number("learning_rate", 2e-6)
    unet_rate = given.number("unet_lr", shared)
    listed = [as_number(rate, f"{given.source}: text_encoder_lr") for rate in given.items("text_encoder_lr")]
    encoder_rates = (listed * 2 if len(listed) == 1 else listed)[:2] or [shared, shared]
    unet = not given.flag("network_train_text_encoder_only") and unet_rate > 0
    encoders = not given.flag("network_train_unet_only") and any(encoder_rates)
    if not unet and not encoders:
        raise UserError(f"{given.source}: unet_lr and text_encoder_lr: nothing trains at these rates")
    rate = unet_rate if unet else max(encoder_rates)
    command.set("tuning", "lora_unet_te" if encoders else "lora_unet", "network_train_unet_only")
    command.set("optimizer.lr", rate, "learning_rate", "unet_lr")
    command.cited |= {"network_train_text_encoder_only", "text_encoder_lr"} if encoders else set()
    if not encoders:
        return
    if not unet:
        command.set("tuning.parts", list(ENCODERS))
    for part, own in zip(ENCODERS, encoder_rates, strict=True):
        command.set(f"tuning.lr_scale.{part}", round(own / rate, 12))


def network(given: Given, command: Command) -> None:
    """Rank, alpha, method and layers of the network. kohya's alpha is 1 and its first factor Kaiming's."""
    if given.context.script != "sdxl_train_network.py":
        return
    module, args = given.text("network_module", "networks.lora"), network_arguments(given)
    if module not in MODULES:
        command.lack("network_module", "choose tuning.method=lora, dora, loha, lokr, oft or boft", module)
    elif module in ("networks.lora_fa", "networks.dylora"):
        command.differ(f"network_module={module}: plain LoRA here", "network_module")
    algorithm = str(args.get("algo", "lora")).lower() if module == "lycoris.kohya" else MODULES.get(module) or "lora"
    method = ALGORITHMS.get(algorithm)
    if method is None:
        command.lack("network_args.algo", f"choose one of algo={', '.join(ALGORITHMS)}", algorithm)
        method = "lora"
    if method == "lora" and args.get("dora_wd") in (True, 1):
        method = "dora"
    elif args.get("dora_wd") in (True, 1):
        command.lack("network_args.dora_wd", "DoRA is a method of its own here, tuning.method=dora")
    rank, alpha = given.number("network_dim", 4), given.number("network_alpha", 1)
    command.set("rank", rank, "network_dim")
    command.set("tuning.alpha", alpha or rank, "network_alpha")
    command.set("tuning.method", method, "network_module", "network_args")
    if method in ("lora", "dora"):
        command.set("tuning.init", "kaiming")
    if method in ("oft", "boft"):
        command.differ(
            f"network_dim={rank}: blocks are counted in another way here; compare the number of parameters "
            "that dry_run=true prints"
        )
    layers(module, args, rank, alpha, command)
    dropouts(given, args, command)
    remaining(args, command)


def layers(module: str, args: dict[str, Any], rank: float, alpha: float, command: Command) -> None:
    """LyCORIS trains convolutions unless its preset says otherwise, `networks.lora` only with conv_dim."""
    is_lycoris = module == "lycoris.kohya"
    preset = str(args.get("preset", "full"))
    chosen = PRESETS.get(preset) if is_lycoris else "conv" if args.get("conv_dim") else "all"
    if chosen is None:
        command.lack("network_args.preset", "choose tuning.layers, tuning.include and tuning.exclude", preset)
        chosen = "conv"
    if is_lycoris and args.get("conv_dim") == 0:
        chosen = "all"
    command.set("tuning.layers", chosen)
    if is_lycoris and preset == "full":
        command.differ("network_args.preset=full: also the first and last convolution and the time embedding there")
    for key in ("conv_dim", "conv_alpha"):
        if chosen != "conv" and args.get(key):
            command.lack(f"network_args.{key}", "no convolutions are trained here", args[key])
    if chosen == "conv":
        command.set("tuning.conv_rank", args.get("conv_dim") or rank)
        command.set("tuning.conv_alpha", args.get("conv_alpha") or (alpha if is_lycoris else 1))


def dropouts(given: Given, args: dict[str, Any], command: Command) -> None:
    dropout = given.number("network_dropout", 0) or args.get("dropout", 0)
    if dropout:
        command.set("tuning.dropout", dropout, "network_dropout")
    for name in ("rank_dropout", "module_dropout"):
        if args.get(name):
            command.set(f"tuning.{name}", args[name])
    if args.get("train_norm") is True:
        command.set("tuning.train_norms", True)
    if args.get("rs_lora") is True:
        command.set("tuning.rslora", True)


def remaining(args: dict[str, Any], command: Command) -> None:
    """LoRA+ and the arguments without an option."""
    ratios = {key: args[key] for key in args if key.startswith("loraplus_")}
    if ratios:
        command.set("tuning.lora_plus", next(iter(ratios.values())))
        if len({*ratios.values()}) > 1:
            command.differ(f"{', '.join(ratios)}: tuning.lora_plus is one number for all parts")
    for key, value in args.items():
        if key not in NETWORK_ARGS:
            command.unknown[f"network_args.{key}"] = ""
        elif NETWORK_ARGS[key] and value not in OFF:
            command.lack(f"network_args.{key}", NETWORK_ARGS[key], value)
        elif NETWORK_ARGS[key] or value in OFF:
            command.same.append(f"network_args.{key}")


def network_arguments(given: Given) -> dict[str, Any]:
    """`--network_args` as a dict."""
    pairs = [str(word).partition("=") for word in given.items("network_args")]
    return {name.strip(): typed(value.strip()) for name, _, value in pairs if name.strip()}


def beginnings(given: Given, command: Command) -> None:
    """Files of LoRAs that training starts from."""
    if "network_weights" in given:
        command.set("tuning.start", given.text("network_weights"), "network_weights")
        command.overrides.pop("tuning.init", None)  # the file takes its place
        if given.flag("dim_from_weights"):
            command.differ("dim_from_weights: rank and tuning.alpha have to be those of the file", "dim_from_weights")
    if files := given.items("base_weights"):
        scales = [as_number(scale, "base_weights_multiplier") for scale in given.items("base_weights_multiplier")]
        scales += [1.0] * (len(files) - len(scales))
        pairs = zip(files, scales, strict=False)
        command.set(
            "model.loras",
            [{"lora": file, "scale": scale} for file, scale in pairs],
            "base_weights",
            "base_weights_multiplier",
        )


def norms(given: Given, command: Command) -> None:
    if largest := given.number("scale_weight_norms", 0):
        command.set("tuning.max_norm", largest, "scale_weight_norms")
    if given.context.script == "sdxl_train_network.py":
        meaningless(command.overrides["tuning.method"] or "lora", NAMES, command)


def meaningless(method: str, names: Mapping[str, str], command: Command) -> None:
    """Take back options that are not defined for a method. names: option of `tuning` -> the other trainer's."""
    always = ("max_norm", "rank_dropout", "module_dropout")
    refused = always if method == "dora" else (*always, "dropout", "rslora", "lora_plus") if method != "lora" else ()
    for option in refused:
        key = names.get(option, option)
        command.drop(f"tuning.{option}", key, f"is not defined for tuning.method={method} here")


NETWORK_RULES: Rules = {
    tuned_parts: (
        "learning_rate",
        "unet_lr",
        "text_encoder_lr",
        "network_train_unet_only",
        "learning_rate_te1",
        "network_train_text_encoder_only",
        "train_text_encoder",
        "learning_rate_te2",
        "token_string",
        "init_word",
        "num_vectors_per_token",
    ),
    network: ("network_module", "network_dim", "network_alpha", "network_args", "network_dropout"),
    beginnings: ("network_weights", "dim_from_weights", "base_weights", "base_weights_multiplier"),
    norms: ("scale_weight_norms",),
}
