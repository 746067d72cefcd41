"""Prior preservation: images of the class that the base model draws before training (Ruiz et al., arXiv:2208.12242).

Knows when an image is drawn and where it is kept. How it is trained on is for the data module.
"""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image

from sdft.data.cache import digest, fingerprint
from sdft.data.decode import StoredImage, UnreadableImage, examine
from sdft.data.scan_cache import user_cache
from sdft.data.source import Sample
from sdft.data.threads import in_threads
from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.formats.json_file import read_json
from sdft.formats.output import full_disk_reported
from sdft.progress import tqdm
from sdft.protocols import DiffusionModel
from sdft.rng import seed_of
from sdft.sampling.generate import PromptEmbeddings, generate, refuse_size
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Positive, Precision, Side

MADE_FROM = "class_images.json"
"""In the folder of the images: what they were drawn from."""


class ClassImages:
    """`count` images of `prompt`, drawn by the base model, as a source: its samples are known before they are drawn.

    prompt: also their caption. weight: factor on their loss.
    folder: where they are kept; by default a folder in the user's cache, whose name is a hash of the model's weights,
        the prompt, the sampler and the size, so that later runs find them.
    sampler, size: the sampler, and the side of the square images in pixels.

    Image i starts from the noise of a seed of (prompt, i). Raises UserError for an empty prompt.
    """

    def __init__(
        self, prompt: str, count: Count, sampler: Sampler, size: Side, weight: Positive = 1.0, folder: str | None = None
    ):
        if not prompt.strip():
            raise UserError("class_images.prompt is empty: write what is drawn, such as a photo of a mug")
        self.prompt, self.count, self.sampler, self.size, self.weight = prompt, count, sampler, size, weight
        self.given = Path(folder).expanduser() if folder else None
        self.folder: Path | None = None
        # A run that is resumed knows generated images by their keys alone.
        kind = digest(self._settings())[:8]
        self.keys = [f"{kind}/{index:06d}" for index in range(count)]

    def __getitem__(self, index: int) -> Sample:
        """Before `draw`, the image is black: its size is known, for a forecast."""
        if self.folder is None:
            image: Any = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (self.size, self.size, 3))
        else:
            file = self.folder / name_of(index)
            image = StoredImage(str(file), file.read_bytes)
        return Sample(self.keys[index], image, self.prompt, self.weight)

    def draw(self, model: Any, precision: Precision = "fp32", device: torch.device | None = None) -> Path:
        """Draw the images that are missing or damaged. Processes that do so at the same time share the work.

        precision: of autocast. device: where the model draws; it is on the CPU afterwards.
        Returns their folder. Raises UserError for a model that cannot draw them, and for a folder with other images.
        """
        if not isinstance(model, DiffusionModel):
            raise UserError("class_images=generated: this model draws no images; set class_images=null")
        refuse_size(model, (self.size, self.size))
        made_from = self._settings() | {"model": fingerprint(model), **reads(model), "precision": precision}
        folder = self.given or user_cache() / "class_images" / digest(made_from)[:32]
        with full_disk_reported(folder, "class_images.folder"):
            claim(folder, made_from, "class_images.folder" if self.given else "")
            missing = self.missing(folder)
            if missing:
                with drawing_on(model, device):
                    self._draw(model, precision, folder, missing)
        self.folder = folder
        return folder

    def missing(self, folder: Path | None) -> list[int]:
        """The images that a folder lacks, or has damaged ones of."""
        if folder is None or not folder.is_dir():
            return list(range(self.count))
        sound = in_threads(lambda index: is_sound(folder / name_of(index), self.size), range(self.count))
        return [index for index, good in enumerate(sound) if not good]

    def describe(self) -> str:
        """What a run would draw, before the model is known."""
        num = len(self.missing(self.given))
        where = f"into {self.given}" if self.given else "those that the cache lacks"
        return f"  would draw {num} images of the class before training, '{self.prompt}': {where}"

    def _settings(self) -> dict[str, Any]:
        own = self.sampler
        sampler = {"name": own.name, "steps": own.steps, "cfg": own.cfg, "negative": own.negative}
        return {"prompt": self.prompt, "size": self.size, "sampler": sampler | {"rescale": own.rescale}}

    def _draw(self, model: DiffusionModel, precision: Precision, folder: Path, missing: Sequence[int]) -> None:
        """Draw by batches of fixed members, so that an interrupted run goes on with the same bits."""
        per_batch, texts = self.sampler.batch_size, PromptEmbeddings(model)
        firsts = sorted({index // per_batch * per_batch for index in missing})
        draw = partial(generate, model, sampler=self.sampler, size_hw=(self.size, self.size), precision=precision)
        hidden = ProcessInfo.current().local_rank > 0
        bar_of = partial(tqdm, desc="drawing the class", unit="image", disable=hidden, leave=False)
        with bar_of(total=self.count, initial=self.count - len(missing)) as bar:
            for first, wanted in claimed(folder, firsts, lambda first: self._of_batch(folder, first)):
                batch = range(first, min(first + per_batch, self.count))
                seeds = [seed_of(0, "class image", self.prompt, index) for index in batch]
                images = draw(prompts=[self.prompt] * len(batch), seeds=seeds, texts=texts)
                for index, image_HWC in zip(batch, images, strict=True):
                    if index in wanted:
                        write_image(folder / name_of(index), image_HWC)
                bar.update(len(wanted))

    def _of_batch(self, folder: Path, first: int) -> list[int]:
        batch = range(first, min(first + self.sampler.batch_size, self.count))
        return [index for index in batch if not is_sound(folder / name_of(index), self.size)]


def as_argument(class_images: ClassImages, target: Any) -> dict[str, Any]:
    """The argument with which a data module takes them. Raises UserError for one that does not."""
    if "class_images" not in inspect.signature(target).parameters:
        name = getattr(target, "__name__", target)
        raise UserError(f"class_images=generated: data of {name} has no place for other images; set class_images=null")
    return {"class_images": class_images}


def name_of(index: int) -> str:
    """The file of an image."""
    return f"{index:06d}.png"


def claim(folder: Path, made_from: dict[str, Any], key: str) -> None:
    """Make the folder, and write down what its images are drawn from.

    Raises UserError if it has images of another model, prompt, sampler or size, or files of somebody else.
    """
    where, file = f"{key}={folder}" if key else str(folder), folder / MADE_FROM
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        before = read_json(file, where)
        if differs := [name for name in made_from if before.get(name) != made_from[name]]:
            raise UserError(
                f"{where}: its images were drawn with another {' and another '.join(differs)}; name another folder, or "
                "remove this one"
            )
        return
    if any(folder.glob("*.png")):
        remedy = "name another folder, or train on them with data=mix"
        raise UserError(f"{where}: has images that were not drawn as class images; {remedy}")
    replace_file(file, (json.dumps(made_from, indent=2, ensure_ascii=False) + "\n").encode())


def claimed(
    folder: Path, batches: Sequence[int], missing_of: Callable[[int], list[int]]
) -> Iterator[tuple[int, list[int]]]:
    """(batch, what is missing of it) of each batch that is this process's to draw; ends when nothing is missing.

    First those that no other process has begun, then what others, which may have been killed, have left.
    """
    left = list(batches)
    for waits in (False, True):
        for first in list(left):
            lock = FileLock(folder / f".{first:06d}.lock")
            try:
                lock.acquire(blocking=waits)
            except Timeout:
                continue
            try:
                left.remove(first)
                if missing := missing_of(first):
                    yield first, missing
                    Path(lock.lock_file).unlink(missing_ok=True)
            finally:
                lock.release()


def is_sound(file: Path, size: int) -> bool:
    """Whether a file is a whole image of this size."""
    try:
        return tuple(examine(file.read_bytes())[:2]) == (size, size)
    except (OSError, UnreadableImage):
        return False


def write_image(file: Path, image_HWC: np.ndarray) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    Image.fromarray(image_HWC).save(content, "PNG")
    replace_file(file, content.getvalue())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(file)


@contextmanager
def drawing_on(model: DiffusionModel, device: torch.device | None) -> Iterator[None]:
    """The model on the device inside the `with`, and back on the CPU afterwards, where the training takes it from."""
    if device is None or device.type == "cpu":
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to("cpu")
        torch.cuda.empty_cache()


def reads(model: DiffusionModel) -> dict[str, Any]:
    """What an image depends on beside the weights: the prediction, and how prompts are read."""
    config = model.scheduler.config
    own = {name: config.get(name) for name in ("prediction_type", "rescale_betas_zero_snr")}
    return own | {name: getattr(model, name, None) for name in ("empty_prompt", "prompt_chunks")}
