"""Options of kohya's sd-scripts for SDXL as options of sdft.

Names and defaults are those of `library/train_util.py`, `train_network.py`, `sdxl_train.py` and `networks/lora.py` of
github.com/kohya-ss/sd-scripts, and of `lycoris/kohya` of github.com/KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sdft.errors import UserError
from sdft.training.translate import kohya_files
from sdft.training.translate.command_line import Command
from sdft.training.translate.kohya_data import DATA_RULES
from sdft.training.translate.kohya_network import ENCODERS, NETWORK_RULES
from sdft.training.translate.kohya_objective import OBJECTIVE_RULES
from sdft.training.translate.kohya_tables import LAUNCHER, NEUTRAL, SAME, SAMPLERS, SCHEDULES, WITHOUT
from sdft.training.translate.optimizers import choose_optimizer
from sdft.training.translate.rules import Given, Rules, Table, apply, as_number, typed

HELD_OUT = "a tenth of the images is held out for validation; data.held_out sets the share"


def translate(text: str, source: str, folder: Path) -> Command:
    """The command of a configuration. folder: of the file, where the files that it names are looked for.

    Raises UserError for a file that is no configuration, that trains another model, or has a wrong value.
    """
    config = kohya_files.read(text, source, folder)
    given = Given(config.values, source, TABLE.known, config)
    for key in ("v2", "clip_l", "t5xxl", "ae", "clip_g"):
        if given.values.get(key) not in (None, False):
            model = "Stable Diffusion 2" if key == "v2" else "Flux or Stable Diffusion 3"
            raise UserError(f"{source}: {key}: is a config for {model}; only those of SDXL have a counterpart here")
    if "pretrained_model_name_or_path" not in given.values:
        raise UserError(f"{source}: pretrained_model_name_or_path: is missing: not a whole configuration of sd-scripts")
    command = Command()
    command.set("model", "sdxl")
    apply(TABLE, given, command)
    launched(config.launcher, command)
    command.differ(HELD_OUT)
    return command


def precision(given: Given, command: Command) -> None:
    """Frozen weights have the dtype of mixed precision there, those that train fp32 unless `full_bf16` is given."""
    mixed = given.text("mixed_precision", "no")
    names = {"no": ("32-true", "fp32"), "fp16": ("16-mixed", "fp16"), "bf16": ("bf16-mixed", "bf16")}
    if mixed not in names:
        raise UserError(f"{given.source}: mixed_precision={mixed}: must be one of {', '.join(names)}")
    name, dtype = names[mixed]
    command.set("trainer.precision", name, "mixed_precision")
    is_full = given.context.script == "sdxl_train.py"
    trained = ("unet", *(ENCODERS if given.flag("train_text_encoder") else ())) if is_full else ()
    for part in ("unet", *ENCODERS):
        wanted = dtype if part not in trained else "bf16" if given.flag("full_bf16") else "fp32"
        if part == "unet" and is_full:
            if wanted != "fp32":
                command.set("++model.dtype.unet", wanted, "full_bf16")
        elif wanted != "bf16":
            command.set(f"model.dtype.{part}", wanted)
    if given.flag("full_bf16") and not is_full:
        command.lack("full_bf16", "adapters train in fp32 here")
    if given.flag("fp8_base") or given.flag("fp8_base_unet"):
        command.set("model.quantization", {"unet": "fp8"}, "fp8_base_unet")
        if given.flag("fp8_base"):
            command.differ(
                "fp8_base: only the UNet is quantised; model.quantization takes text encoders too", "fp8_base"
            )


def schedule(given: Given, command: Command) -> None:
    """lr_scheduler and its numbers; constant is kohya's default, cosine ours."""
    name, steps = given.text("lr_scheduler", "constant"), given.number("max_train_steps", 1600)
    known = SCHEDULES.get(name.partition(":")[0])
    if known is None or "lr_scheduler_type" in given:
        command.lack(
            "lr_scheduler_type" if "lr_scheduler_type" in given else "lr_scheduler",
            "choose one of lr_schedule=cosine, linear, polynomial, cosine_restarts, rex, warmup_stable_decay",
            given.get("lr_scheduler_type", name),
        )
        known = SCHEDULES["constant"]
    option, values = known
    command.set("lr_schedule", option, "lr_scheduler")
    warmup = warmup_steps(given, command, steps)
    if "AdamWScheduleFree".lower() in given.text("optimizer_type", "").lower():
        command.set("optimizer.warmup_steps", warmup, "lr_warmup_steps")
        warmup = 0
    command.set("lr_schedule.warmup_steps", warmup, *(["lr_warmup_steps"] if warmup else []))
    if warmup:
        command.differ("lr_warmup_steps: the first step has a rate of 1 / warmup_steps here, of 0 there")
    for key, (setting, default) in values.items():
        if key == "lr_decay_steps":
            decay = given.number(key, default)
            command.set(f"lr_schedule.{setting}", decay if decay < 1 else decay / steps, key)
        else:
            command.set(
                f"lr_schedule.{setting}", given.number(key, default) if key else default, *([key] if key else [])
            )


def warmup_steps(given: Given, command: Command, steps: int) -> int:
    """As a number of steps: kohya takes a share of the run below 1, too."""
    warmup = given.number("lr_warmup_steps", 0)
    if not 0 < warmup < 1:
        return int(warmup)
    if "max_train_epochs" in given:
        command.lack(
            "lr_warmup_steps",
            "is a share of the run there, whose steps are not known before the images are "
            "counted: set lr_schedule.warmup_steps to a number of steps",
            warmup,
        )
        return 0
    return round(warmup * steps)


def length(given: Given, command: Command) -> None:
    """Epochs take precedence over steps, as there."""
    epochs = given.number("max_train_epochs")
    if epochs is None:
        command.set("trainer.max_steps", given.number("max_train_steps", 1600), "max_train_steps")
        return
    command.set("epochs", epochs, "max_train_epochs")
    command.set("trainer.max_steps", 10**6)
    if "max_train_steps" in given:
        command.lack(
            "max_train_steps", "max_train_epochs takes precedence over it, there too", given.get("max_train_steps")
        )


def optimizer(given: Given, command: Command) -> None:
    name = given.text("optimizer_type", "") or "AdamW"
    if given.flag("use_8bit_adam"):
        name = "AdamW8bit"
    if given.flag("use_lion_optimizer"):
        name = "Lion"
    command.cited |= {"optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"} & set(given.values)
    choose_optimizer(name, arguments(given, "optimizer_args"), given, command, "optimizer_args.")
    if given.flag("fused_backward_pass"):
        command.set("fused_backward", True, "fused_backward_pass")


def arguments(given: Given, key: str) -> dict[str, Any]:
    """`name=value` arguments of a list."""
    words = [str(word) for word in given.items(key)]
    split = [item for word in words for item in (word.split() if all("=" in w for w in word.split()) else [word])]
    pairs = [item.partition("=") for item in split]
    return {name: typed(value) if "," not in value else value.strip("()[]") for name, _, value in pairs}


def saving(given: Given, command: Command) -> None:
    """Files during the run: kohya keeps all unless told how many."""
    every, kept = given.number("save_every_n_steps"), given.number("save_last_n_steps")
    if every and given.context.script != "sdxl_train.py":
        command.set("callbacks.lora_files.every", every, "save_every_n_steps")
        if kept:
            command.set("callbacks.lora_files.keep", kept // every + 1, "save_last_n_steps")
    elif every and kept:
        command.set("callbacks.last.every", every, "save_every_n_steps")
        command.set("callbacks.last.keep", kept // every + 1, "save_last_n_steps")
    elif every:
        command.set("callbacks", "progress", "save_every_n_steps")
        command.set("callbacks.kept.every_n_train_steps", every, "save_every_n_steps")
    command.remove("callbacks.ema")
    if given.context.script == "sdxl_train.py":
        precision = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(given.text("save_precision", "float"), "fp32")
        command.set("export.dtype", precision, "save_precision")
        if "diffusers" not in given.text("save_model_as", ""):
            command.set("export.single_file", True, "save_model_as")
    elif given.text("save_precision", "fp16") != "fp16":
        command.lack("save_precision", "LoRA files are fp16 here", given.get("save_precision"))
    name, folder = given.text("output_name", ""), given.text("output_dir", "")
    if name:
        command.set("name", name, "output_name")
    if folder:
        command.set("run_dir", f"{folder.rstrip('/')}/{name or 'last'}", "output_dir")


def samples(given: Given, command: Command) -> None:
    """Prompts of a file beside the config, with the options of each."""
    if "sample_prompts" in given:
        file = kohya_files.found(given.text("sample_prompts"), given.context.folder)
        is_text = file is not None and file.suffix == ".txt"
        lines = kohya_files.text_of(file, given.source, "sample_prompts").splitlines() if file and is_text else []
        entries = [prompt_of(line, command) for line in lines if line.strip() and not line.startswith("#")]
        if entries:
            command.set("prompts", [entry["prompt"] for entry in entries], "sample_prompts")
            if any(len(entry) > 1 for entry in entries):
                prompts = [entry if len(entry) > 1 else entry["prompt"] for entry in entries]
                command.set("callbacks.previews.prompts", prompts, "sample_prompts")
        else:
            command.lack("sample_prompts", "give its prompts as prompts=[...]", given.get("sample_prompts"))
    sampler = given.text("sample_sampler", "ddim") if "sample_sampler" in given or "sample_prompts" in given else None
    if sampler in SAMPLERS:
        command.set("sampler", SAMPLERS[sampler], "sample_sampler")
    elif sampler is not None:
        command.lack("sample_sampler", "choose one of sampler=euler, ddim, heun, dpmpp_2m", sampler)


def prompt_of(line: str, command: Command) -> dict[str, Any]:
    """A line of `sample_prompts` as an entry of callbacks.previews.prompts."""
    text, *options = re.split(r"\s--", line)
    entry: dict[str, Any] = {"prompt": text.strip()}
    sides: dict[str, int] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name in ("w", "h") and value.isdigit():
            sides[name] = int(value)
        elif name in ("d", "s") and value.isdigit():
            entry[{"d": "seed", "s": "steps"}[name]] = int(value)
        elif name == "l" and re.fullmatch(r"\d*\.?\d+", value):
            entry["cfg"] = float(value)
        elif name == "n":
            entry["negative"] = value.strip()
        elif name == "ss" and value.strip() in SAMPLERS:
            entry["sampler"] = SAMPLERS[value.strip()]
        else:
            command.differ(f"sample_prompts: --{name} of a prompt has no counterpart")
    if sides:
        entry["size"] = [sides.get("h", sides.get("w", 0)), sides.get("w", sides.get("h", 0))]
    return entry


def logging(given: Given, command: Command) -> None:
    tool = given.text("log_with", "tensorboard" if "logging_dir" in given else "")
    loggers = {"": "csv", "tensorboard": "csv_tensorboard", "wandb": "csv_wandb", "all": "csv_wandb"}
    if tool not in loggers:
        raise UserError(f"{given.source}: log_with={tool}: must be one of tensorboard, wandb, all")
    command.set("logger", loggers[tool], "log_with")
    if tool == "all":
        command.differ("log_with=all: to Weights & Biases and metrics.csv; TensorBoard is logger=csv_tensorboard")
    if "logging_dir" in given:
        command.differ("logging_dir: logs are in the folder of the run, run_dir", "logging_dir")
    if "log_tracker_name" in given and tool in ("wandb", "all"):
        command.set("logger.wandb.project", given.text("log_tracker_name"), "log_tracker_name")


def attention(given: Given, command: Command) -> None:
    if given.flag("xformers"):
        command.set("model.attention", "xformers", "xformers")


def launched(words: tuple[str, ...], command: Command) -> None:
    """Arguments of `accelerate launch`."""
    values = kohya_files.parse_options([word for word in words if word not in LAUNCHER["commands"]])
    for key, value in values.items():
        if key == "num_processes" and value is not True:
            command.set("trainer.devices", as_number(value, key), key)
        elif key == "num_machines" and value is not True and str(value) != "1":
            command.set("trainer.num_nodes", as_number(value, key), key)
        elif key in LAUNCHER["without"] or key.startswith("--"):
            command.same.append(f"{key} (of accelerate)")
        else:
            command.lack(f"{key} (of accelerate)", "trainer.* and strategy= choose devices here")


RULES: Rules = {
    **NETWORK_RULES,
    **OBJECTIVE_RULES,
    precision: ("mixed_precision", "train_text_encoder", "full_bf16", "fp8_base", "fp8_base_unet"),
    optimizer: ("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer", "fused_backward_pass"),
    schedule: (
        "lr_scheduler",
        "lr_scheduler_type",
        "lr_warmup_steps",
        "lr_decay_steps",
        "lr_scheduler_num_cycles",
        "lr_scheduler_power",
        "lr_scheduler_min_lr_ratio",
    ),
    length: ("max_train_epochs", "max_train_steps"),
    **DATA_RULES,
    attention: ("xformers",),
    saving: ("save_every_n_steps", "save_last_n_steps", "save_precision", "save_model_as", "output_name", "output_dir"),
    samples: ("sample_prompts", "sample_sampler"),
    logging: ("log_with", "logging_dir", "log_tracker_name"),
}
TABLE = Table(SAME, RULES, WITHOUT, NEUTRAL)
