"""What real runs learn from, sample by sample: the same whatever the workers, the batches, the ranks or a resume."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import lightning as L
import pytest
import torch
from checks import slow

from sdft.batch import Batch
from sdft.data.augmentation import Augmentation
from sdft.data.datamodule import Images
from sdft.data.source import Source
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.checkpoints import last_checkpoint
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter


class ShuffledStream(L.Callback):
    """Writes every sample of a run and what the UNet was asked about it, one file a rank."""

    def __init__(self, folder: Path):
        self.folder, self.told, self.asked = folder, [], []

    def setup(self, trainer: L.Trainer, module: Finetuning, stage: str) -> None:
        if trainer.world_size > 1:
            torch.set_num_threads(1)  # a fork does not have the threads of its parent

    def on_train_start(self, trainer: L.Trainer, module: Finetuning) -> None:
        def keep(unet: torch.nn.Module, given: tuple) -> None:
            if unet.training:
                self.asked += zip(*(tensor.detach() for tensor in given), strict=True)  # z_t, t, context

        module.model.unet.register_forward_pre_hook(keep)

    def on_train_batch_start(self, trainer: L.Trainer, module: Finetuning, batch: Batch, batch_idx: int) -> None:
        tensors = (batch.pixels_BCHW, batch.time_ids_B6, batch.dropped_by_encoder_BE, batch.loss_weight_B)
        for i, told in enumerate(zip(batch.keys, batch.visits, batch.captions, strict=True)):
            self.told.append((*told, *(tensor[i].numpy().tobytes() for tensor in tensors)))

    def on_train_end(self, trainer: L.Trainer, module: Finetuning) -> None:
        torch.save(list(zip(self.told, self.asked, strict=True)), self.folder / f"rank{trainer.global_rank}")


class Killed(Exception):
    pass


class KillAt(L.Callback):
    """Ends a run before its step number `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise Killed


def run(
    source: Source, others: Source, model, folder: Path, batches: tuple[int, int, int], *callbacks: L.Callback,
    workers: int = 0, resume: Path | None = None,
) -> list:  # fmt: skip
    """The samples of a run in their order. batches: size, how many are accumulated, and on how many ranks."""
    batch_size, accumulate, ranks = batches
    options = {"crop": "random", "flip": True, "caption_dropout": 0.3, "encoder_dropout": (0.2, 0.3), "cache": "off"}
    changes = Augmentation(zoom=0.2, rotation=10, brightness=0.2, contrast=0.2, saturation=0.3, hue=0.05)
    options["augmentation"] = changes
    data = Images(source, others, batch_size, 64, seed=5, bucket_step=16, num_workers=workers, **options)
    module = Finetuning(model(), Adapter(rank=2), Denoising(), partial(adamw, lr=1e-3), constant, seed=7)
    folder.mkdir(exist_ok=True)
    whole = trainer(
        4, accumulate_grad_batches=accumulate, accelerator="cpu", devices=ranks, progress_bar=False,
        strategy="ddp_fork" if ranks > 1 else "auto", run_dir=str(folder),
        callbacks=[*callbacks, ShuffledStream(folder), last_checkpoint(str(folder), every=2)],
    )  # fmt: skip
    whole.fit(module, data, ckpt_path=resume, weights_only=False)
    parts = [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(ranks)]
    batched = [[part[i : i + batch_size] for i in range(0, len(part), batch_size)] for part in parts]
    return list(chain.from_iterable(chain.from_iterable(zip(*batched, strict=True))))


def assert_same(found: Iterable, expected: Iterable) -> None:
    """Keys, visits, captions, pixels, sizes and crops, dropouts, weights and timesteps to the bit; noisy latents and
    contexts but for the rounding of encoders, which depends on the size of a batch."""
    for (told, (z_t, t, context)), (wanted, (wanted_z_t, wanted_t, wanted_context)) in zip(
        found, expected, strict=True
    ):
        assert told == wanted
        assert t == wanted_t
        torch.testing.assert_close(z_t, wanted_z_t, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(context, wanted_context, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["folder", slow("shards"), slow("mix")])
def test_a_run_learns_the_same_however_it_is_fed(name: str, sources, tiny_source, tiny_model, tmp_path: Path) -> None:
    """Steps of 8: workers, batches, ranks, and a resume in the middle of a pass over buckets."""
    learn = partial(run, sources[name], tiny_source(2), tiny_model)
    straight = learn(tmp_path / "straight", (8, 1, 1))
    assert len(straight) == 4 * 8
    assert len({told[0] for told, _ in straight}) >= 8
    assert len({z_t.shape for _, (z_t, _, _) in straight}) == 3
    assert_same(learn(tmp_path / "accumulated", (2, 4, 1), workers=1), straight)
    assert_same(learn(tmp_path / "workers", (8, 1, 1), workers=4), straight)
    assert_same(learn(tmp_path / "ranks", (4, 1, 2)), straight)
    with pytest.raises(Killed):
        learn(tmp_path / "resumed", (4, 2, 1), KillAt(2))
    last = tmp_path / "resumed" / "checkpoints" / "last.ckpt"
    assert_same(learn(tmp_path / "resumed", (4, 2, 1), workers=1, resume=last), straight[16:])
