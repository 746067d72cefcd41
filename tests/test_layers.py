"""The table of docs/architecture.md: imports go down only, and only some modules may import a third party.

All imports of a file count, also those inside functions.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS, LIGHTNING, SERVICES, CONCEPTS, BASICS = 4, 3, 2, 1, 0

LAYERS = {
    "train": COMMANDS,
    "eval": COMMANDS,
    "sdft.config": COMMANDS,
    "sdft.api": COMMANDS,
    "sdft.captioning.commands": COMMANDS,
    "sdft.choosing.run": COMMANDS,
    "sdft.masking.commands": COMMANDS,
    "sdft.training.run": COMMANDS,
    "sdft.training.sweep": COMMANDS,
    "sdft.evaluation.run": COMMANDS,
    "sdft.merging.run": COMMANDS,
    "sdft.planning.dry_run": COMMANDS,
    "sdft.publish": COMMANDS,
    "sdft.training": LIGHTNING,
    "sdft.module": LIGHTNING,
    "sdft.data.datamodule": LIGHTNING,
    "sdft.data.pair_datamodule": LIGHTNING,
    "sdft.distributed.strategies": LIGHTNING,
    "sdft.distributed.saving": SERVICES,
    "sdft.sampling": SERVICES,
    "sdft.planning": SERVICES,
    "sdft.training.receipt": SERVICES,
    "sdft.board": SERVICES,
    "sdft.captioning": SERVICES,
    "sdft.choosing": SERVICES,
    "sdft.evaluation": SERVICES,
    "sdft.masking": SERVICES,
    "sdft.merging": SERVICES,
    "sdft.batch": BASICS,
    "sdft.distributed.processes": BASICS,
    "sdft.distributed.sharding": BASICS,
    "sdft.errors": BASICS,
    "sdft.hardware": BASICS,
    "sdft.progress": BASICS,
    "sdft.protocols": BASICS,
    "sdft.rng": BASICS,
    "sdft.types": BASICS,
}
"""The longest matching prefix counts; whatever is not named is a concept."""

SIDEWAYS = {
    ("models", "formats"): "a checkpoint is loaded through its format",
    ("tuning", "formats"): "an adapter can start from a file; rotations, which peft lacks, are the layers files apply",
    ("data", "pages"): "images to look at are shown on a page",
    ("captioning", "evaluation"): "the judge of the toy world can also name what it sees",
    ("choosing", "evaluation"): "what is chosen among was measured by the evaluation",
    ("evaluation", "sampling"): "a verdict generates the images that it evaluates",
}
"""Packages of one layer do not import each other, except these."""

RESERVED = {
    "hydra": ("layer 4",),
    "omegaconf": ("layer 4",),
    "yaml": ("layer 4",),
    "pydantic": ("sdft.config.check",),
    "lightning": ("layer 3", "layer 4"),
    "pytorch_lightning": (),
    "peft": ("sdft.tuning", "sdft.formats"),
    "diffusers": ("sdft.models", "sdft.sampling", "sdft.evaluation", "sdft.formats"),
    "transformers": tuple(
        f"sdft.{part}"
        for part in ("captioning", "masking", "models", "optimizers", "sampling", "evaluation", "formats")
    ),
    "onnxruntime": ("sdft.captioning",),
    "webdataset": ("sdft.data.sources", "sdft.data.sharding"),
    "datasets": ("sdft.data.sources",),
    "pyarrow": ("sdft.data.sources", "sdft.evaluation.tables"),
    "wandb": ("sdft.training.callbacks.tracking",),
    "tensorboard": ("sdft.training.callbacks.tensorboard",),
    "xformers": ("sdft.models",),
    "pytorch_optimizer": ("sdft.optimizers",),
    "bitsandbytes": ("sdft.optimizers", "sdft.models"),
    "safetensors": ("sdft.formats", "sdft.merging", "sdft.data.cache"),
}
"""Who may import what; a third party that is not named here is free."""

FOR_BASICS = {"torch", "annotated_types", "tqdm", *sys.stdlib_module_names}

FILES = sorted([*(ROOT / "sdft").rglob("*.py"), *ROOT.glob("*.py")])


def name_of(file: Path) -> str:
    """`sdft/data/images.py` is `sdft.data.images`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def layer_of(module: str) -> int:
    if module == "sdft" or module.endswith(".__main__"):  # the package itself exports the Python API
        return COMMANDS
    prefixes = (prefix for prefix in LAYERS if inside(module, prefix))
    return LAYERS.get(max(prefixes, key=len, default=""), CONCEPTS)


def inside(module: str, prefix: str) -> bool:
    return f"{module}.".startswith(f"{prefix}.")


def part_of(module: str) -> str:
    """`sdft.data.toy.rendering` belongs to `data`."""
    return module.split(".")[1] if module.startswith("sdft.") else module


def imports(source: str) -> Iterator[str]:
    """Full names of all imported modules; `from sdft.training import receipt` gives `sdft.training.receipt`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else str(node.module)


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`."""
    found = []
    for imported in sorted(set(imports(source))):
        top = imported.split(".")[0]
        if top == "sdft" or imported in ("train", "eval"):
            if imported != "sdft" and not may_import(module, imported):
                found.append(f"{module} (layer {layer_of(module)}) imports {imported} (layer {layer_of(imported)})")
        elif layer_of(module) == BASICS and top not in FOR_BASICS:
            found.append(f"{module} (layer 0) imports {top}")
        elif top in RESERVED and not any(inside(module, f) or f == f"layer {layer_of(module)}" for f in RESERVED[top]):
            found.append(f"{module} imports {top}, which is for {', '.join(RESERVED[top]) or 'no one'}")
    return found


def may_import(module: str, imported: str) -> bool:
    above, below = layer_of(module), layer_of(imported)
    if above != below:
        return above > below
    same = part_of(module) == part_of(imported) or above in (COMMANDS, BASICS)
    return same or (part_of(module), part_of(imported)) in SIDEWAYS


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_and_are_allowed(file: Path) -> None:
    assert complaints(name_of(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("sdft.objective.denoising", "from sdft.models.sdxl import SDXL", "imports sdft.models.sdxl"),
        ("sdft.models.sdxl", "import sdft.sampling.generate", "imports sdft.sampling.generate"),
        ("sdft.data.dataset", "from sdft.data.datamodule import Images", "imports sdft.data.datamodule"),
        ("sdft.formats.adapter", "from sdft.models import load", "imports sdft.models"),
        ("sdft.rng", "def f():\n    import numpy", "imports numpy"),
        ("sdft.rng", "from sdft import objective", "imports sdft.objective"),
        ("sdft.module", "from hydra.utils import instantiate", "imports hydra"),
        ("sdft.tuning.adapter", "import diffusers", "imports diffusers"),
        ("sdft.sampling.generate", "import lightning as L", "imports lightning"),
        ("sdft.training.callbacks.ema", "if False:\n    import wandb", "imports wandb"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, complaint: str) -> None:
    (found,) = complaints(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "import hydra, lightning\nfrom sdft.config.check import check\nfrom sdft.module import Finetuning"),
        ("sdft.models.nano.__main__", "from sdft.module import Finetuning"),
        ("sdft.models.load", "from sdft.formats.diffusers_folder import write_folder"),
        ("sdft.data.datamodule", "import lightning\nfrom sdft.data.dataset import Source"),
        ("sdft.types", "import torch, math\nfrom annotated_types import Ge"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_every_named_part_of_the_table_is_spelt_right() -> None:
    """A prefix that matches nothing would guard nothing."""
    named = {owner for owners in RESERVED.values() for owner in owners if owner.startswith("sdft")}
    assert {*LAYERS, *named} <= MODULES
