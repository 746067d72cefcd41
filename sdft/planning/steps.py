"""The length of a run as a function of the number of its images."""

from __future__ import annotations

from typing import Any

from sdft.distributed.processes import num_processes
from sdft.errors import UserError


def num_steps(data: Any, per_step: int, epochs: float | None, fewest: int, most: int) -> int:
    """Optimizer steps of a run: `epochs` passes over the training images, at least `fewest`, at most `most`.

    data: the data module; each of its sizes has batches of its own. With `data.sizes`, a pass reads as many images as
    there are, which are distributed over the sides by their shares. per_step: images of one step, on all devices.
    epochs: `most` steps if None; beside class images, passes over the user's own.

    Raises UserError for numbers that are not positive.
    """
    if epochs is None:
        return most
    for key, value in (("epochs", epochs), ("min_steps", fewest)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UserError(f"{key}={value}: must be a number above 0")
    of_one_epoch = 0.0
    for indices in data.train_set.by_size().values():
        share = data.sizes.shares[data.train_set.items.side_of[indices[0]]] if data.sizes else 1
        of_one_epoch += share * -(-len(indices) // per_step)
    return min(max(round(epochs * of_one_epoch / data.own_per_pass), int(fewest)), most)


def set_steps(cfg: Any, data: Any) -> None:
    """Set `trainer.max_steps` of a run's config to what `epochs`, `min_steps` and the number of images come to."""
    trainer = cfg.trainer
    devices = num_processes(trainer.accelerator, trainer.devices, trainer.num_nodes)
    per_step = data.batch_size * trainer.accumulate_grad_batches * devices
    trainer.max_steps = num_steps(data, per_step, cfg.epochs, cfg.min_steps, trainer.max_steps)
