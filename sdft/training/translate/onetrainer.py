"""Configs of OneTrainer for SDXL as options of sdft.

Names and defaults are those of `modules/util/config/TrainConfig.py`, `ConceptConfig.py` and `optimizer_util.py` of
github.com/Nerogar/OneTrainer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft.errors import UserError
from sdft.training.translate.command_line import Command
from sdft.training.translate.onetrainer_data import CONCEPT_RULES
from sdft.training.translate.onetrainer_objective import OBJECTIVE_RULES
from sdft.training.translate.onetrainer_optimizers import OPTIMIZER_DEFAULTS, OPTIMIZERS
from sdft.training.translate.onetrainer_tables import (
    DTYPES,
    FORMER,
    NEUTRAL,
    PARTS_OF_OTHERS,
    SAME,
    SCHEDULES,
    WHOLE,
    WITHOUT,
)
from sdft.training.translate.onetrainer_tuning import TUNING_RULES, epochs_of
from sdft.training.translate.optimizers import choose_optimizer
from sdft.training.translate.rules import Given, Rules, Table, apply

MODEL = "STABLE_DIFFUSION_XL_10_BASE"
ALWAYS = ("a tenth of the images is held out for validation; data.held_out sets the share",)


def translate(tree: dict[str, Any], source: str, folder: Path) -> Command:
    """The command of a config. folder: of the file, where its concepts are looked for.

    Raises UserError for a config of another model or training method, or a wrong value.
    """
    values = flattened(tree)
    given = Given(values, source, TABLE.known, folder)
    if given.text("model_type", MODEL) != MODEL:
        raise UserError(
            f"{source}: model_type={given.get('model_type')}: is a config for another model; only those of {MODEL} "
            "have a counterpart here"
        )
    if given.text("training_method", "FINE_TUNE") not in ("FINE_TUNE", "LORA", "EMBEDDING"):
        raise UserError(
            f"{source}: training_method={given.get('training_method')}: only FINE_TUNE, LORA and EMBEDDING "
            "have a counterpart here"
        )
    command = Command()
    command.set("model", "sdxl", "model_type")
    apply(TABLE, given, command)
    for line in ALWAYS:
        command.differ(line)
    return command


def read(text: str, source: str) -> dict[str, Any]:
    """The config in a text. Raises UserError for one that is none of OneTrainer's."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: is not JSON ({error})") from error
    if isinstance(tree, dict) and {"LoRA_type", "pretrained_model_name_or_path"} & tree.keys():
        raise UserError(
            f"{source}: pretrained_model_name_or_path: is a config of the kohya_ss GUI; its button 'Print training "
            "command' writes the command line, which can be translated"
        )
    if not isinstance(tree, dict) or not {"training_method", "model_type", "base_model_name"} & tree.keys():
        raise UserError(f"{source}: training_method: is missing: neither a config of OneTrainer nor of sd-scripts")
    return tree


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """`{"unet": {"train": true}}` as `{"unet.train": true}`, with the present names of former options."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key not in WHOLE:
            values |= {f"{key}.{inner}": item for inner, item in value.items()}
        elif key == "latent_caching":
            values |= {"image_caching": value, "text_caching": value}
        elif key == "optimizer":
            values["optimizer.optimizer"] = value
        else:
            values[FORMER.get(key, key)] = value
    return values


def optimizer(given: Given, command: Command) -> None:
    name = given.text("optimizer.optimizer", "ADAMW")
    ours, defaults = OPTIMIZERS.get(name, name), OPTIMIZER_DEFAULTS.get(name, {})
    arguments = {key: given.get(f"optimizer.{key}", default) for key, default in defaults.items()}
    betas = [arguments.pop(key) for key in ("beta1", "beta2", "beta3") if key in arguments]
    if all(beta is not None for beta in betas) and betas:
        arguments["betas"] = betas
    command.cited |= {
        key for key in given.values if key.startswith("optimizer.") and key[10:] in (*defaults, "optimizer")
    }
    choose_optimizer(ours, arguments, given, command, "optimizer.")
    if given.flag("optimizer.fused_back_pass"):
        command.set("fused_backward", True, "optimizer.fused_back_pass")


def schedule(given: Given, command: Command) -> None:
    """OneTrainer takes a warm-up of at most 1 as a share of the run; its final rate is 0 by default."""
    name, warmup = given.text("learning_rate_scheduler", "CONSTANT"), given.number("learning_rate_warmup_steps", 200)
    if name not in SCHEDULES:
        command.lack(
            "learning_rate_scheduler", "choose one of lr_schedule=constant, cosine, linear, polynomial, rex", name
        )
    option = SCHEDULES.get(name, "constant")
    command.set("lr_schedule", option, "learning_rate_scheduler")
    if 0 < warmup <= 1:
        command.lack(
            "learning_rate_warmup_steps",
            "is a share of the run there, whose steps are not known before the "
            "images are counted: set lr_schedule.warmup_steps to a number of steps",
            warmup,
        )
        warmup = 0
    if command.overrides["optimizer"] == "schedule_free_adamw":
        command.set("optimizer.warmup_steps", int(warmup), "learning_rate_warmup_steps")
        warmup = 0
    command.set("lr_schedule.warmup_steps", int(warmup), *(["learning_rate_warmup_steps"] if warmup else []))
    if option != "constant":
        command.set("lr_schedule.final", given.number("learning_rate_min_factor", 0.0), "learning_rate_min_factor")
    if option == "cosine_restarts":
        command.set(
            "lr_schedule.cycles", max(1, round(given.number("learning_rate_cycles", 1))), "learning_rate_cycles"
        )


def length(given: Given, command: Command) -> None:
    command.set("epochs", epochs_of(given), "epochs")
    if epochs_of(given) < given.number("epochs", 100):
        command.differ(f"epochs={given.get('epochs', 100)}: all parts stop after {epochs_of(given)}")
    command.set("trainer.max_steps", 10**6)
    clip = given.number("clip_grad_norm", 0 if "clip_grad_norm" in given.values else 1.0)  # null clips nothing
    command.set("trainer.gradient_clip_val", clip, "clip_grad_norm")
    scaler = given.text("learning_rate_scaler", "NONE")
    factors = {
        "NONE": 1,
        "BATCH": given.number("batch_size", 1),
        "GRADIENT_ACCUMULATION": given.number("gradient_accumulation_steps", 1),
    }
    factors["BOTH"] = factors["BATCH"] * factors["GRADIENT_ACCUMULATION"]
    factors |= {f"GLOBAL_{kind}": factors[kind] for kind in ("BATCH", "BOTH")}
    if scaler not in factors:
        command.lack("learning_rate_scaler", "multiply optimizer.lr by hand", scaler)
    elif factors[scaler] != 1:
        rate = float(command.overrides["optimizer.lr"] or 0) * factors[scaler] ** 0.5
        command.set("optimizer.lr", float(f"{rate:.6g}"), "learning_rate_scaler")


def averages(given: Given, command: Command) -> None:
    """EMA is off by default there, on here."""
    mode = given.text("ema", "OFF")
    if mode == "OFF":
        command.remove("callbacks.ema", "ema")
        return
    command.set("callbacks.ema.decay", given.number("ema_decay", 0.999), "ema", "ema_decay")
    command.set("callbacks.ema.offload", mode == "CPU", "ema")
    if (every := given.number("ema_update_step_interval", 5)) != 1:
        command.differ(f"ema_update_step_interval={every}: updated at every step here", "ema_update_step_interval")


def precision(given: Given, command: Command) -> None:
    names = {"FLOAT_32": "32-true", "TFLOAT_32": "32-true", "FLOAT_16": "16-mixed", "BFLOAT_16": "bf16-mixed"}
    name = given.text("train_dtype", "FLOAT_16")
    if name not in names:
        raise UserError(f"{given.source}: train_dtype={name}: must be one of {', '.join(names)}")
    command.set("trainer.precision", names[name], "train_dtype")
    if given.text("training_method", "FINE_TUNE") == "FINE_TUNE":
        command.set(
            "export.dtype",
            {"FLOAT_16": "fp16", "BFLOAT_16": "bf16"}.get(given.text("output_dtype", ""), "fp32"),
            "output_dtype",
        )
        if "DIFFUSERS" not in given.text("output_model_format", ""):
            command.set("export.single_file", True, "output_model_format")
    elif given.text("output_dtype", "FLOAT_32") != "FLOAT_16":
        command.differ("output_dtype: LoRA files are fp16 here", "output_dtype")
    quantised = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        key = f"{part}.weight_dtype"
        kind, dtype = DTYPES.get(given.text(key, "FLOAT_32"), ("", ""))
        if kind == "quantization":
            quantised[part] = dtype
            command.cited.add(key)
        elif kind == "dtype":
            is_new = part == "unet" and command.overrides["tuning"] not in ("lora_unet", "lora_unet_te")
            command.set(f"{'++' if is_new else ''}model.dtype.{part}", dtype, key)
        else:
            command.lack(
                key, "model.dtype takes fp32, bf16 and fp16, model.quantization int8, fp8 and nf4", given.get(key)
            )
    if quantised:
        command.set("model.quantization", quantised)


def checkpointing(given: Given, command: Command) -> None:
    """A setting of each part there, of the whole model here."""
    keys = [key for key in ("gradient_checkpointing", "unet.gradient_checkpointing") if key in given]
    value = given.get(keys[0]) if keys else True
    command.set("model.gradient_checkpointing", str(value) not in ("OFF", "False", "false"), *keys)
    if str(value) == "CPU_OFFLOADED":
        command.differ("gradient_checkpointing=CPU_OFFLOADED: model.offload_blocks=N keeps blocks on the CPU here")
    attention = {"XFORMERS": "xformers", "DEFAULT": "eager"}.get(given.text("attention_mechanism", "SDP"))
    if attention:
        command.set("model.attention", attention, "attention_mechanism")
    if given.flag("compile"):
        command.set("model.compile", "blocks", "compile")


def files(given: Given, command: Command) -> None:
    """Names of the run and of what is read."""
    destination = given.text("output_model_destination", "").replace("\\", "/").rpartition("/")[2]
    if destination:
        command.set("name", destination.removesuffix(".safetensors"), "output_model_destination")
    if given.text("workspace_dir", ""):
        command.set("run_dir", given.text("workspace_dir"), "workspace_dir")
    if given.text("vae.model_name", ""):
        command.set("model.vae", given.text("vae.model_name"), "vae.model_name")
    if given.flag("continue_last_backup"):
        command.set("resume", "auto", "continue_last_backup")
    command.set("logger", "csv_tensorboard" if given.flag("tensorboard", True) else "csv", "tensorboard")
    for unit, every, option in (
        ("backup_after_unit", "backup_after", "callbacks.last.every"),
        ("sample_after_unit", "sample_after", "callbacks.previews.every"),
    ):
        if given.text(unit, "MINUTE") == "STEP":
            command.set(option, max(1, int(given.number(every, 1))), unit, every)
        elif given.text(unit, "NEVER") not in ("NEVER", "ALWAYS") and every in given:
            command.lack(every, f"{option}=N counts steps", f"{given.get(every)} {given.text(unit)}")
            command.cited.add(unit)
    if given.flag("rolling_backup"):
        command.set(
            "callbacks.last.keep", given.number("rolling_backup_count", 3), "rolling_backup", "rolling_backup_count"
        )


RULES: Rules = {
    **TUNING_RULES,
    **OBJECTIVE_RULES,
    optimizer: (
        "optimizer.optimizer",
        "optimizer.fused_back_pass",
        *sorted({f"optimizer.{key}" for keys in OPTIMIZER_DEFAULTS.values() for key in keys}),
    ),
    schedule: (
        "learning_rate_scheduler",
        "learning_rate_warmup_steps",
        "learning_rate_min_factor",
        "learning_rate_cycles",
    ),
    length: ("epochs", "clip_grad_norm", "learning_rate_scaler", "batch_size", "gradient_accumulation_steps"),
    averages: ("ema", "ema_decay", "ema_update_step_interval"),
    precision: (
        "train_dtype",
        "output_dtype",
        "output_model_format",
        "unet.weight_dtype",
        "text_encoder.weight_dtype",
        "text_encoder_2.weight_dtype",
    ),
    **CONCEPT_RULES,
    checkpointing: ("gradient_checkpointing", "unet.gradient_checkpointing", "attention_mechanism", "compile"),
    files: (
        "output_model_destination",
        "workspace_dir",
        "vae.model_name",
        "continue_last_backup",
        "tensorboard",
        "backup_after",
        "backup_after_unit",
        "sample_after",
        "sample_after_unit",
        "rolling_backup",
        "rolling_backup_count",
        "model_type",
        "training_method",
    ),
}
TABLE = Table(SAME, RULES, {**WITHOUT, **PARTS_OF_OTHERS}, NEUTRAL)
