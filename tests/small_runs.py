"""Runs of the tiny model on one process or several, each in processes of their own that can be killed.

They fork from a server that has everything imported and has never computed: a start costs a tenth of a second.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from checks import assert_equal
from tiny import TinySource, build_tiny_model

from sdft.data.datamodule import Images
from sdft.distributed.strategies import ddp, fsdp
from sdft.errors import UserError
from sdft.formats.training_checkpoint import read_state
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.weighting import MinSNR
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import cosine
from sdft.training.callbacks.ema import EMA
from sdft.training.callbacks.export import Export
from sdft.training.callbacks.guard import Guard
from sdft.training.checkpoints import best_checkpoint, last_checkpoint
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters
from sdft.tuning.words import Words

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("unet", "text_encoder", "text_encoder_2")
TUNINGS = {
    "full": Full,
    "words": partial(Words, new_words={"<sks>": "red cat"}),
    "lora_unet": partial(Adapter, rank=2, alpha=4.0),
    "lora_unet_te": partial(Adapter, rank=2, alpha=4.0, parts=PARTS, new_words={"<sks>": "red cat"}),
}
EVERYTHING: dict[str, dict[str, Any]] = {
    "full": {"bucket_step": 16, "num_workers": 1, "accumulate": 2},
    "lora_unet": {"dropout": 0.3, "keep": 2},
    "lora_unet_te": {"cache": "off", "bucket_step": 16},
}
"""What has a state in each mode, besides the average and the caption dropout that all have."""
WRONG = 7
"""Exit status of a run that ended with a UserError; its text lies in `error_N.txt`."""


@dataclass
class Run:
    """What a run is; by default, everything that has a state is on."""

    folder: Path
    tuning: str = "lora_unet"
    strategy: Literal["one", "ddp", "fsdp", "hybrid"] = "one"
    batch_size: int = 2
    accumulate: int = 1
    max_steps: int = 6
    save_every: int = 3
    validate_every: int = 4
    keep: int = 1
    precision: str = "32-true"
    accelerator: Literal["cpu", "gpu"] = "cpu"
    resume: Path | None = None
    caption_dropout: float = 0.4
    bucket_step: int | None = None
    sizes: dict[int, float] | None = None
    size_schedule: str | None = None
    num_workers: int = 0
    cache: str = "ram"
    cache_dir: str | None = None
    dropout: float = 0.0
    recompute: bool = False
    clip: float = 1.0
    lr: float = 1e-2
    eps: float = 1e-4
    """Of AdamW: keeps it from turning the rounding of a vanishing gradient into a full step."""
    tuning_options: dict[str, Any] = field(default_factory=dict)
    objective_options: dict[str, Any] = field(default_factory=dict)
    part_schedules: dict[str, Any] = field(default_factory=dict)
    export: bool = False
    spoil: Callable[[TinySource], None] | None = None
    """Does something to the pictures."""
    callbacks: list[L.Callback] = field(default_factory=list)

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


class KillAt(L.Callback):
    """Ends the process with no chance to clean up, in the step after `step` are done, at one of `PLACES`.

    saved: a file that must be there first: a save may still be under way.
    """

    PLACES = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_save_checkpoint")

    def __init__(self, step: int, place: str = "on_train_batch_start", saved: Path | None = None):
        self.step, self.place, self.saved = step, place, saved

    def _at(self, trainer: L.Trainer, place: str) -> None:
        if place == self.place and trainer.global_step >= self.step:
            while self.saved and not self.saved.is_file():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, "on_train_batch_start")

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, "on_before_optimizer_step")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, "on_train_batch_end")

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.place == "on_save_checkpoint" and trainer.global_step >= self.step:
            checkpoint["bomb"] = Bomb()


class Bomb:
    """Kills the process that pickles it: the file is open then, and half written."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class FullFrom(L.Callback):
    """From a step on, this rank's files cannot grow."""

    def __init__(self, step: int, size: int, rank: int = 0):
        self.step, self.size, self.rank = step, size, rank

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Losses(L.Callback):
    """Keeps the loss of each batch over all ranks, as the run logs it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.seen.append(float(module.latest.mean_loss))


class Mixed(TinySource):
    """Pictures of two shapes, for buckets."""

    def __init__(self, num: int, name: str = "noise"):
        super().__init__(num, name)
        self.images = [image if i % 3 else image[:, :20] for i, image in enumerate(self.images)]


def train(run: Run) -> dict[str, Any]:
    """Trains, and gives what rank 0 knows at the end."""
    torch.set_num_threads(1)
    losses, average = Losses(), EMA(0.9)

    def new_module() -> Finetuning:
        model = build_tiny_model()
        if run.recompute:
            model.unet.enable_gradient_checkpointing()
        options = {**({"dropout": run.dropout} if run.dropout else {}), **run.tuning_options}
        schedule = partial(cosine, warmup_steps=2, final=0.1)
        optimizer = partial(adamw, lr=run.lr, eps=run.eps)
        objective = Denoising(**{"weighting": MinSNR(), **run.objective_options})
        tuning = TUNINGS[run.tuning](**options)
        return Finetuning(model, tuning, objective, optimizer, schedule, seed=7, part_schedules=run.part_schedules)

    source = (Mixed if run.bucket_step else TinySource)(7)
    if run.spoil:
        run.spoil(source)
    data = Images(
        source,
        (Mixed if run.bucket_step else TinySource)(2, "held out"),
        batch_size=run.batch_size,
        size=32,
        seed=3,
        flip=True,
        caption_dropout=run.caption_dropout,
        bucket_step=run.bucket_step,
        sizes=run.sizes,
        size_schedule=run.size_schedule,
        num_workers=run.num_workers,
        cache=run.cache,
        cache_dir=run.cache_dir,
    )
    strategies = {"one": lambda: "auto", "ddp": ddp, "fsdp": fsdp, "hybrid": partial(fsdp, shard_ranks=2)}
    fit = trainer(
        max_steps=run.max_steps,
        validate_every=run.validate_every,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=run.clip,
        precision=run.precision,
        accelerator=run.accelerator,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        progress_bar=False,
        strategy=strategies[run.strategy](),
        callbacks=[
            average,
            losses,
            *run.callbacks,
            Guard(str(run.folder)),
            best_checkpoint(str(run.folder)),
            last_checkpoint(str(run.folder), every=run.save_every, keep=run.keep),
        ],
        run_dir=str(run.folder),
    )
    module = new_module()
    fit.fit(module, data, ckpt_path=run.resume, weights_only=False)
    if run.strategy in ("fsdp", "hybrid"):
        module = fit.strategy.gather(module, new_module)
    trained = trainable_parameters(module.model) if fit.is_global_zero else ()
    weights = {name: p.detach().cpu().clone() for name, p in trained}
    validation = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val/")}
    if run.export and fit.is_global_zero:
        Export().write(module, run.folder, {"title": "run", "prediction": "epsilon", "size_hw": (32, 32), "words": ()})
    return {"losses": losses.seen, "weights": weights, "validation": validation, "step": fit.global_step}


def _rank(run: Run, rank: int, world_size: int, port: int, function: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the data's workers: their own server would be slow
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    try:
        torch.save(function(run), run.folder / f"result_{rank}.pt")
    except UserError as error:
        (run.folder / f"error_{rank}.txt").write_text(str(error))
        os._exit(WRONG)
    except SystemExit as left:
        os._exit(left.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["sdft.module", "sdft.training.trainer", "sdft.training.callbacks.export", "sdft.config.command", "peft"]
)


def start(run: Run, world_size: int = 1, function: Any = train) -> list[Any]:
    """Starts the processes of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(run, rank, world_size, port, function)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks: list[Any], seconds: float = 120) -> list[int]:
    """The exit status of each process; one that hangs is killed and counts as -9."""
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in ranks]


def result(run: Run, world_size: int = 1) -> dict[str, Any]:
    """What a run that must end well knows at its end."""
    assert finish(start(run, world_size)) == [0] * world_size
    return torch.load(run.folder / "result_0.pt", weights_only=False)


def assert_same_end(a: Run, b: Run, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["step"] == theirs["step"]
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name]), name
    assert ours["validation"] == theirs["validation"]
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "Images"):
        assert_equal(read_state(a.last)[name], read_state(b.last)[name], name)
    assert_equal(read_state(a.last)["callbacks"]["EMA"], read_state(b.last)["callbacks"]["EMA"], "EMA")


def train_py(words: list[str], run: Run) -> None:
    """The command `python train.py WORDS`, in a process that has its imports already."""
    command_py("sdft.training", [*words, f"run_dir={run.folder}"], run)


def command_py(module: str, words: list[str], run: Run) -> None:
    """The command `python -m MODULE WORDS`, in a process that has its imports already."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    main = importlib.import_module(f"{module}.__main__")
    sys.argv = [str(main.__file__), *words]
    main.main()
