"""Overhead of the framework: time of a training step, and time to the first step, relative to plain PyTorch.

    python -m benchmarks.step
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from sdft.config.command import build, compose

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS, WARM_UP, NUM_STARTS = 60, 5, 3
IMPORTS = "import torch, lightning, diffusers, transformers, peft, hydra, wandb; \
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel; from transformers import CLIPTextModel"


def steps() -> tuple[list[float], list[float]]:
    """Seconds of steps of the framework and of plain PyTorch, alternating, so that other load affects both.

    The framework is `train.py`'s own Trainer with the callbacks and loggers that act at every step.
    """
    import lightning as L

    from sdft.module import Finetuning

    ours: list[float] = []
    theirs: list[float] = []
    bare_step = bare()

    class Turns(L.Callback):
        def on_train_start(self, *_) -> None:
            self.resumed = time.perf_counter()

        def on_train_batch_end(self, *_) -> None:
            ended = time.perf_counter()
            next(bare_step)
            ours.append(ended - self.resumed)
            theirs.append(time.perf_counter() - ended)
            self.resumed = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        limit = f"trainer.max_steps={NUM_STEPS}"
        cfg = compose("train", ["experiment=dreamy_style", limit, "logger=csv", f"run_dir={folder}"])
        data, tuning, objective = (build(cfg[name]) for name in ("data", "tuning", "objective"))
        trainer = build(
            cfg.trainer,
            callbacks=[build(cfg.callbacks.ema), Turns()],
            loggers=[build(logger) for logger in cfg.logger.values()],
        )
        module = Finetuning(build(cfg.model), tuning, objective, build(cfg.optimizer), build(cfg.lr_schedule), 0)
        trainer.fit(module, data)
    return ours[WARM_UP:], theirs[WARM_UP:]


def bare() -> Iterator[None]:
    """Steps of a plain loop over the same model, loss, optimiser and average."""
    from sdft.data.dataset import collate
    from sdft.data.order import BatchOrder
    from sdft.hardware import default_precision
    from sdft.rng import Draws
    from sdft.tuning.parameters import trainable_parameters

    in_bf16 = default_precision(on_gpu=False) == "bf16-mixed"  # as trainer.precision=auto
    cfg = compose("train", ["experiment=dreamy_style"])
    data, tuning, objective = (build(cfg[name]) for name in ("data", "tuning", "objective"))
    model = build(cfg.model)
    tuning.attach(model)
    data.encode_once(model.encode_moments, torch.device("cpu"), vae=model.vae)
    optimizer = build(cfg.optimizer)(tuning.groups(model))
    parameters = [p for _, p in trainable_parameters(model)]
    average = [p.detach().clone() for p in parameters]
    model.train()
    for items in BatchOrder(len(data.train_set.source.keys), data.batch_size, 0, 0, NUM_STEPS):
        batch = collate([data.train_set[item] for item in items])
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            report = objective(model, batch, Draws(0, batch.keys, batch.visits))
            loss = (report.per_sample_B * batch.loss_weight_B).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, p in zip(average, parameters, strict=True):
                kept.lerp_(p, 0.01)
        yield


def start() -> tuple[float, float]:
    """Seconds from the command to the end of the first step, and of the imports alone."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    imports = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        stop = "+callbacks.stop._target_=benchmarks.first_step.StopAtFirstStep"
        words = ["experiment=dreamy_style", stop, f"run_dir={folder}/run"]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "train.py", *words], check=True, capture_output=True, cwd=ROOT)
        return time.perf_counter() - begun, imports


def main() -> None:
    """Both comparisons."""
    torch.backends.cuda.enable_flash_sdp(False)
    ours, theirs = steps()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    milliseconds = [1e3 * statistics.median(times) for times in (ours, theirs)]
    print("step: framework {:.0f} ms, bare {:.0f} ms (medians)".format(*milliseconds))
    print(f"step ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.3f} (goal: at most 1.03)")
    starts = []
    for _ in range(NUM_STARTS):
        whole, imports = start()
        starts.append(whole / imports)
        print(f"start: to the end of the first step {whole:.1f} s, bare imports {imports:.1f} s")
    print(f"start ratio, median of {len(starts)}: {statistics.median(starts):.2f} (goal: at most 1.2)")


if __name__ == "__main__":
    main()
