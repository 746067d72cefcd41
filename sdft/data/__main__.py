"""Work on data from the command line: `python -m sdft.data COMMAND`, with `key=value`."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sdft.config.command import CONF_DIR, build, command
from sdft.data.contact_sheet import ContactSheet
from sdft.data.error_messages import collected
from sdft.data.images import CropPlan
from sdft.data.packed_strings import printable
from sdft.data.page.write import write_page
from sdft.data.sharding import write_shards
from sdft.data.source import Sample
from sdft.data.summary import DataSummary, summarize
from sdft.errors import UserError
from sdft.progress import tqdm

MISSING = "(no caption)"
TASKS = ("style", "word", "product", "character", "brand")


@command("data_check")
def check(cfg: DictConfig) -> None:
    """Check every image and caption; print a summary and write contact sheets."""
    from sdft.models.tokens import token_counter

    options = {"unreadable": "skip", "cache": "off"}
    if "default_caption" in cfg.data and cfg.data.default_caption is None:
        options["default_caption"] = MISSING
    with collected() as errors:
        data = build(cfg.data, **options)
    sheets: dict[tuple[int, int], ContactSheet] = defaultdict(ContactSheet)

    def visit(sample: Sample, image: np.ndarray, plan: CropPlan) -> None:
        sheets[plan.target_hw].add(image, plan, sample.key, sample.caption)

    parts = [(data.train_set, data.train_scan), (data.validation_set, data.validation_scan)]
    model = cfg.get("model")
    counter = token_counter(model.weights, model.config) if model else None
    found = summarize(parts, visit, partial(tqdm, desc="checking", unit="image"), counter)
    found.broken, found.left_out = data.skipped, data.left_out
    most_tokens = 75 * model.prompt_chunks + 2 if model else 0
    print("\n".join(found.lines(cfg.caption.format(caption=MISSING), most_tokens)))
    print("\n".join(sensible_steps(len(data.train_set.source.keys))))
    for (h, w), sheet in sorted(sheets.items()):
        num = found.target_hw.count((h, w))
        sheet.save(Path(cfg.out) / f"{w}x{h}.png", f"{w} x {h}: {len(sheet.cells)} of {num} images")
    print(f"contact sheets in {cfg.out}")
    look_at(found, Path(cfg.out))
    if errors:
        raise UserError("\n".join(map(str, errors)))


def sensible_steps(num: int) -> list[str]:
    """How many steps each task of `experiment=` would take with `num` training images, and where that comes from."""
    recipe = OmegaConf.load(CONF_DIR / "recipe" / "sdxl_lora_unet.yaml")
    per_step = recipe.data.batch_size * recipe.trainer.accumulate_grad_batches
    found = [f"steps of {per_step} images that experiment=NAME model=sdxl takes for {num} training images:"]
    for task in TASKS:
        options = OmegaConf.load(CONF_DIR / "experiment" / f"{task}.yaml")
        wanted = -(-options.epochs * num // per_step)
        steps = min(max(wanted, options.min_steps), options.trainer.max_steps)
        bound = {options.min_steps: ", the least", options.trainer.max_steps: ", the most"}.get(steps, "")
        found.append(f"  {task:<10} {steps:>6} ({options.epochs} passes{bound if steps != wanted else ''})")
    return [*found, "  (passes of the best runs on nano, see docs/recipes.md; a first guess for other sets)"]


def look_at(found: DataSummary, out: Path) -> None:
    """Write the page of flagged images, and the list of those that are nearly the same as another."""
    if not found.thumbnails:
        return
    num = write_page(out / "flagged.html", found, str(out))
    print(f"next: open {out / 'flagged.html'}, {num} images to look at, and train with data.exclude=FILE")
    if found.proposed:
        lines = [f"# nearly the same as {printable(best)}\n{printable(key)}\n" for key, best in found.proposed.items()]
        (out / "exclude.txt").write_text("".join(lines), encoding="utf-8")
        print(f"{len(found.proposed)} that are nearly the same as another are listed in {out / 'exclude.txt'}")


@command("data_cache")
def cache(cfg: DictConfig) -> None:
    """Encode every image and caption that is not in the cache yet."""
    import torch

    data = build(cfg.data, cache="disk", cache_dir=cfg.out)
    model = build(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    data.encode_once(model.encode_moments, model.device, vae=model.get_submodule(model.VAE))
    listed = data.encode_texts_once(model.encode_prompts, model.prompt_ids, *model.text_encoders)
    print(f"{len(data.store)} entries in {cfg.out}, {time.monotonic() - started:.0f} s")
    if not listed:
        print("captions are encoded during training, since their tags vary")
    print(f"next: python train.py ... data.cache=disk data.cache_dir={cfg.out}")


@command("data_shard")
def shard(cfg: DictConfig) -> None:
    """Write the images and captions of a source as tar shards, each with an index."""
    job, source = build(cfg.job), build(cfg.source)
    bar = partial(tqdm, desc="writing", unit="image")
    shards = write_shards(source, Path(job.out), job.per_shard, bar, job.most_gb)
    print(f"{len(source.keys)} images in {len(shards)} shards")
    print(f"next: data=webdataset data.shards='{cfg.out}/{{000000..{len(shards) - 1:06d}}}.tar'")


@command("data_toy")
def toy(cfg: DictConfig) -> None:
    """Write toy scenes as PNG files with their captions beside them."""
    out, world = Path(cfg.out), build(cfg.world)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: is not an empty folder; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    try:
        for index in tqdm(range(cfg.count), unit="image"):
            sample = world[index]
            Image.fromarray(sample.image_HWC).save(out / f"{index:05d}.png")
            (out / f"{index:05d}.txt").write_text(sample.caption + "\n", encoding="utf-8")
    except (OSError, KeyboardInterrupt):
        shutil.rmtree(out, ignore_errors=True)  # it was empty before
        raise
    print(f"{cfg.count} images in {out}")


def later(module: str, name: str) -> Callable[[], None]:
    """A command that imports its module, and the libraries of models, only when it runs."""
    return lambda: getattr(importlib.import_module(module), name)()


COMMANDS: dict[str, Callable[[], None]] = {"check": check, "cache": cache, "shard": shard, "toy": toy}
COMMANDS |= {name: later("sdft.captioning.commands", name) for name in ("caption", "edit", "tags")}
COMMANDS["mask"] = later("sdft.masking.commands", "mask")


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"error: name one of: {', '.join(COMMANDS)}, as in python -m sdft.data toy out=DIR", file=sys.stderr)
        raise SystemExit(2)
    COMMANDS[sys.argv.pop(1)]()


if __name__ == "__main__":
    main()
