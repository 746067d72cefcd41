"""Optimizers of other trainers: the option here, and the library's defaults where ours differ."""

from __future__ import annotations

import re
from typing import Any

from sdft.training.translate.command_line import Command
from sdft.training.translate.rules import Given, as_number

ADAM = {"betas": [0.9, 0.999], "weight_decay": 0.01}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", ADAM),
    "pagedadamw": ("adamw", ADAM),
    "pagedadamw32bit": ("adamw", ADAM),
    "adamw8bit": ("adamw_8bit", ADAM),
    "pagedadamw8bit": ("adamw_8bit", ADAM),
    "lion": ("lion", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "lion8bit": ("lion", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "pagedlion8bit": ("lion", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "adafactor": ("adafactor", {"weight_decay": 0.0, "clip_threshold": 1.0}),
    "prodigy": ("prodigy", {"betas": [0.9, 0.999], "weight_decay": 0.0, "d_coef": 1.0}),
    "came": ("came", {"betas": [0.9, 0.999, 0.9999], "weight_decay": 0.0}),
    "adamwschedulefree": ("schedule_free_adamw", {"betas": [0.9, 0.999], "weight_decay": 0.0}),
    "sgdnesterov": ("sgd", {"momentum": 0.9, "weight_decay": 0.0}),
    "sgdnesterov8bit": ("sgd", {"momentum": 0.9, "weight_decay": 0.0}),
    "sgd": ("sgd", {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}),
    "muon": ("muon", {"momentum": 0.95, "weight_decay": 0.0}),
}
"""Name in lower case without punctuation -> the option here, and the defaults of its library."""
INSTEAD = (
    ("dadapt", "prodigy"),
    ("prodigy", "prodigy"),
    ("came", "came"),
    ("lion", "lion"),
    ("schedulefree", "schedule_free_adamw"),
    ("sgd", "sgd"),
    ("", "adamw"),
)
"""The nearest option for a name that has none, by a part of the name."""
OURS = {"d0": 1e-6, "eps": 1e-8, "decay_rate": -0.8, "nesterov": True}
"""Arguments of our optimizers that their files in conf/ leave at these defaults."""
TAKES = {
    "eps": ("adamw", "adamw_8bit"),
    "d0": ("prodigy",),
    "d_coef": ("prodigy",),
    "decay_rate": ("adafactor",),
    "clip_threshold": ("adafactor",),
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd",),
}
FIXED = {
    ("adafactor", "relative_step"): False,
    ("adafactor", "scale_parameter"): False,
    ("adafactor", "warmup_init"): False,
    ("prodigy", "use_bias_correction"): True,
    ("prodigy", "safeguard_warmup"): True,
    ("prodigy", "decouple"): True,
}
"""Arguments that are not options here, and their values here."""
THEIRS = {
    ("adafactor", "relative_step"): True,
    ("adafactor", "scale_parameter"): True,
    ("prodigy", "use_bias_correction"): False,
    ("prodigy", "safeguard_warmup"): False,
}
"""Their values in the libraries, where they differ."""


def choose_optimizer(name: str, arguments: dict[str, Any], given: Given, command: Command, prefix: str) -> None:
    """Set the optimizer and its numbers.

    name: as there, a class path too. arguments: of its constructor. prefix: of their names in comments.
    """
    bare = re.sub(r"[^a-z0-9]", "", re.split(r"[./]", name)[-1].lower())
    option, defaults = OPTIONS.get(bare, (None, {}))
    if option is None:
        option = next(ours for part, ours in INSTEAD if part in bare)
        defaults = next(defaults for ours, defaults in OPTIONS.values() if ours == option)
        command.differ(f"optimizer {name}: optimizer={option} is the nearest; optimizer._target_=CLASS takes any class")
    elif bare.startswith("paged") or (bare.endswith("8bit") and option not in ("adamw_8bit",)):
        command.differ(
            f"optimizer {name}: optimizer={option} keeps its states in {'8 bits' if '8bit' in option else 'fp32'} "
            "on the GPU; fused_backward=true saves the gradients"
        )
    command.set("optimizer", option)
    for key, value in {**defaults, **arguments}.items():
        set_argument(option, key, value, given, command, prefix)
    for (of, key), theirs in THEIRS.items():
        if of == option and bare in OPTIONS and key not in arguments:
            command.differ(f"{prefix}{key}: {theirs} by default there, {FIXED[of, key]} here")


def set_argument(option: str, key: str, value: Any, given: Given, command: Command, prefix: str) -> None:
    """One argument of the optimizer."""
    where = f"{given.source}: {prefix}{key}"
    if key == "betas":
        numbers = value if isinstance(value, list) else str(value).strip("()[]").split(",")
        command.set("optimizer.betas", [as_number(str(number).strip(), where) for number in numbers])
    elif key in ("weight_decay", "warmup_steps") or option in TAKES.get(key, ()):
        if value is not None and value != OURS.get(key):
            plus = "+" if key in OURS else ""
            command.set(f"{plus}optimizer.{key}", value if isinstance(value, bool) else as_number(value, where))
    elif (option, key) in FIXED:
        if value != FIXED[option, key]:
            command.differ(f"{prefix}{key}={value}: {FIXED[option, key]} here, always")
    elif value is not None:
        command.lack(
            f"{prefix}{key}",
            f"optimizer={option} has no such argument; optimizer._target_=CLASS takes any class",
            value,
        )
