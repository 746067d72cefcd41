"""Training SDXL, random weights: images/s, share of the matmul rate and peak memory, compared with a plain loop.

    python -m benchmarks.gpu                             # SDXL at 1024 px; needs a GPU
    python -m benchmarks.gpu --model nano --steps 4      # the same code on the shipped nano, on any device

Each line is a new process, so that memory and caches of the lines are independent. sdft's lines are runs of its own
Trainer with the callbacks that act at every step. The plain loop is diffusers and PyTorch with the same weights,
dtypes, checkpointing and average, written as a tutorial would. Beside the peak stands what `dry_run` forecasts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

MODES = ("lora_unet", "lora_unet_te", "full")
VARIANTS: dict[str, dict[str, Any]] = {
    "sdft": {},
    "compile": {"compile": True},
    "channels_last": {"channels_last": True},
    "no_checkpointing": {"gradient_checkpointing": False},
    "xformers": {"attention": "xformers"},
    "eager": {"attention": "eager"},
}
"""Lines of the table: the options of the model that differ from the recipe's."""
PLAIN = "plain loop"
WARM_UP, PROFILED = 3, 5
CAPTION = "a photo of a cat"


class Noise:
    """A data source: pictures of noise, held in memory."""

    def __init__(self, num: int, size: int, name: str):
        self.keys = [f"{name}/{i}" for i in range(num)]
        self.size = size

    def __getitem__(self, index: int):
        from sdft.data.source import Sample

        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Sample(self.keys[index], pixels, CAPTION)


def build_model(args: argparse.Namespace, device: torch.device):
    """nano as shipped, or SDXL with random weights, the frozen parts in bf16."""
    from sdft.formats.architecture import PARTS, empty_network
    from sdft.models.attention import set_attention
    from sdft.models.load import SDXL_BASE, pretrained
    from sdft.models.sdxl import SDXL

    options = VARIANTS.get(args.variant, {})
    model = pretrained("nano")
    if args.model == "sdxl":
        networks = {}
        for part in PARTS:
            network = empty_network(part, SDXL_BASE / part).to_empty(device=device)
            networks[part] = network.to(dtypes(args.mode)[part])
            for name, parameter in network.named_parameters():
                randomise(name, parameter.data)
        # The tokenizers of nano do: their ids are below SDXL's, and ends are found by the tokenizer's own mark.
        model = SDXL(**networks, tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, scheduler=model.scheduler)
        if options.get("gradient_checkpointing", True):
            model.unet.enable_gradient_checkpointing()
        for encoder in (model.text_encoder, model.text_encoder_2):
            position_ids(encoder, device)
    set_attention(model.unet, options.get("attention", "sdpa"))
    if options.get("channels_last"):
        model.unet.to(memory_format=torch.channels_last)
    if options.get("compile"):
        model.unet.compile()
    return model.to(device)


def dtypes(mode: str) -> dict[str, torch.dtype]:
    """Of the parts, as the recipes set them."""
    frozen = {"text_encoder": torch.bfloat16, "text_encoder_2": torch.bfloat16, "vae": torch.float32}
    return {**frozen, "unet": torch.float32 if mode == "full" else torch.bfloat16}


def randomise(name: str, value: torch.Tensor) -> None:
    """Weights that keep the scale of what passes through them, so that no activation overflows."""
    if value.ndim > 1:
        value.normal_(std=0.7 * value[0].numel() ** -0.5)
    else:
        value.fill_(float(name.endswith("weight")))


def position_ids(encoder, device: torch.device) -> None:
    """The one buffer of an encoder, which empty networks leave undefined on another device."""
    embeddings = encoder.get_submodule("text_model.embeddings" if hasattr(encoder, "text_model") else "embeddings")
    embeddings.position_ids = torch.arange(77, device=device)[None]


def autocast(device: torch.device) -> torch.autocast:
    """The precision that `trainer.precision=auto` chooses on this device."""
    from sdft.hardware import default_precision

    in_bf16 = default_precision(on_gpu=device.type == "cuda") == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16)


def tuning_of(mode: str):
    """The tuning of a mode, as the config builds it."""
    from sdft.tuning.adapter import Adapter
    from sdft.tuning.full import Full

    parts = ("unet", "text_encoder", "text_encoder_2") if mode == "lora_unet_te" else ("unet",)
    return Full() if mode == "full" else Adapter(rank=16, parts=parts)


def data_of(args: argparse.Namespace):
    """Pictures for a few steps, whose latents are cached."""
    from sdft.data.datamodule import Images

    train, validation = Noise(max(8, args.batch_size), args.size, "train"), Noise(1, args.size, "validation")
    return Images(train, validation, batch_size=args.batch_size, size=args.size)


def module_of(args: argparse.Namespace, model):
    """The LightningModule of a run."""
    from sdft.module import Finetuning
    from sdft.objective.denoising import Denoising
    from sdft.objective.weighting import MinSNR
    from sdft.optimizers.optimizers import adamw
    from sdft.optimizers.schedules import constant

    objective = Denoising("epsilon", weighting=MinSNR())
    return Finetuning(model, tuning_of(args.mode), objective, partial(adamw, lr=1e-5), constant, seed=0)


def ours(args: argparse.Namespace, device: torch.device) -> tuple[Any, Clock]:
    """The model, and the clock of its steps as `train.py` makes them."""
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from sdft.training.callbacks.ema import EMA
    from sdft.training.callbacks.guard import Guard
    from sdft.training.trainer import trainer

    clock = Clock(args, device)

    class Steps(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.step_done()

    model = build_model(args, device)
    with tempfile.TemporaryDirectory() as folder:
        fit = trainer(
            max_steps=clock.num_steps,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            progress_bar=False,
            callbacks=[EMA(0.999), Guard(folder), Steps()],
            loggers=[CSVLogger(folder)],
            run_dir=folder,
        )
        fit.fit(module_of(args, model), data_of(args))
    return model.to(device), clock


def plain(args: argparse.Namespace, device: torch.device) -> tuple[Any, Clock]:
    """The model, and the clock of the same steps in the way of the public example scripts."""
    model = build_model(args, device)
    tuning_of(args.mode).attach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    alphas_cumprod = model.scheduler.alphas_cumprod.to(device)
    moments_BCHW, time_ids_B6 = fake_latents(args, model, device)
    model.train()
    model.vae.cpu()
    clock = Clock(args, device)
    for _ in range(clock.num_steps):
        mean, logvar = moments_BCHW.chunk(2, dim=1)
        z0 = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * model.vae.config.scaling_factor
        eps, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=device)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        with autocast(device):
            context, pooled = model.encode_prompts([CAPTION] * len(z0))
            added = {"text_embeds": pooled, "time_ids": time_ids_B6}
            z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
            prediction = model.unet(z_t, t, context, added_cond_kwargs=added).sample
            loss = F.mse_loss(prediction.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.001)
        clock.step_done()
    return model, clock


def fake_latents(args: argparse.Namespace, model, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of a batch of latents, and the sizes that SDXL is conditioned on."""
    side, channels = args.size // model.vae_factor, model.latent_channels
    generator = torch.Generator().manual_seed(0)
    moments_BCHW = torch.randn(args.batch_size, 2 * channels, side, side, generator=generator).to(device)
    sizes = [[args.size, args.size, 0, 0, args.size, args.size]] * args.batch_size
    return moments_BCHW, torch.tensor(sizes, dtype=torch.float32, device=device)


class Clock:
    """Times a block of steps after a warm-up, with the device idle at both ends; profiles a few steps if asked.

    start_gib: peak memory up to the end of the warm-up, with the encoding of images; later peaks are those of steps.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.num_measured, self.device, self.file = args.steps, device, args.profile
        self.num_steps = WARM_UP + args.steps + (PROFILED if self.file else 0)
        self.done, self.seconds, self.start_gib = 0, float("nan"), float("nan")

    def step_done(self) -> None:
        """To be called after each step."""
        self.done += 1
        if self.done == WARM_UP:
            if self.device.type == "cuda":
                self.start_gib = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
            self._begun = self._now()
        if self.done == WARM_UP + self.num_measured:
            self.seconds = (self._now() - self._begun) / self.num_measured
            if self.file:
                self._profiler = torch.profiler.profile()
                self._profiler.start()
        if self.file and self.done == self.num_steps:
            wall = (self._now() - self._begun) - self.seconds * self.num_measured
            self._profiler.stop()
            self._write(wall)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _write(self, wall: float) -> None:
        """The kernels that take longest, and the share of the time in which none runs."""
        averages = self._profiler.key_averages()
        on_gpu = self.device.type == "cuda"
        table = averages.table(sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=25)
        calls = averages.table(sort_by="self_cpu_time_total", row_limit=25)
        kernels = sum(e.self_device_time_total for e in averages if e.device_type != torch.autograd.DeviceType.CPU)
        busy = f"kernels {kernels / 1e6:.3f} s of {wall:.3f} s wall time in {PROFILED} steps"
        Path(self.file).write_text(f"{busy}\n\n{table}\n\n{calls}\n")


def flops_of_a_step(args: argparse.Namespace, model, device: torch.device) -> float:
    """Twice the forward for a LoRA, three times for a full step: a LoRA needs no gradient of the frozen weights."""
    from sdft.batch import Conditioning

    moments_BCHW, time_ids_B6 = fake_latents(args, model, device)
    with torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter:
        context, pooled = model.encode_prompts([CAPTION] * args.batch_size)
        before = counter.get_total_flops()
        z_BCHW, t_B = moments_BCHW.chunk(2, dim=1)[0], torch.zeros(args.batch_size, dtype=torch.long, device=device)
        model.denoise(z_BCHW, t_B, Conditioning(context, pooled, time_ids_B6))
    return (counter.get_total_flops() - before) * (3 if args.mode == "full" else 2)


def matmul_rate(device: torch.device) -> float:
    """Measured bf16 matmul, FLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / sorted(times)[len(times) // 2]


def one(args: argparse.Namespace) -> dict[str, float]:
    """The measurements of one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.init()
    model, clock = (plain if args.variant == PLAIN else ours)(args, device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else float("nan")
    model.unet._compiled_call_impl = None  # compiled kernels hide their FLOPs
    share = flops_of_a_step(args, model, device) / clock.seconds / matmul_rate(device)
    return {
        "images_per_s": args.batch_size / clock.seconds,
        "share_of_matmul": share,
        "memory_gib": memory,
        "reserved_gib": reserved,
        "start_gib": clock.start_gib,
    }


def forecast(args: argparse.Namespace) -> dict[str, float]:
    """GiB that `dry_run` forecasts for the recipe of a mode, without the allowance for libraries."""
    from sdft.models.load import SDXL_ID, pretrained_on_meta
    from sdft.planning.footprint import MetaBuild, Setup, memory_needs

    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    chosen = {part: names[dtype] for part, dtype in dtypes(args.mode).items()}
    checkpointing = VARIANTS[args.variant].get("gradient_checkpointing", True)
    if args.model == "sdxl":
        model = pretrained_on_meta(SDXL_ID, dtype=chosen, gradient_checkpointing=checkpointing)
    else:
        model = pretrained_on_meta("nano")
    with MetaBuild():
        module = module_of(args, model)
    needs = memory_needs(module, data_of(args), Setup(1, 1, "bf16-mixed", 1, 1, on_gpu=True), num_averages=1)
    return {"forecast_gib": needs.total / 2**30}


def line(args: argparse.Namespace, variant: str, *flags: str, **changed: Any) -> dict[str, float] | str:
    """One line, measured in a separate process; the error if it fails."""
    values = {**vars(args), **changed}
    words = [f"--{name}={values[name]}" for name in ("model", "size", "batch_size", "steps", "mode")]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--variant", variant, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        errors = [row for row in done.stderr.strip().splitlines() if row.strip()]
        return errors[-1][:160] if errors else f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """The table, or one line of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("sdxl", "nano"), default="sdxl")
    parser.add_argument("--size", type=int, default=0, help="side of the pictures; 1024, or 64 for nano")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["lora_unet", "full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sdft", "compile"])
    parser.add_argument("--profile", help="with --variant: file for the kernels of five more steps")
    parser.add_argument("--variant", choices=(PLAIN, *VARIANTS), help="print one line as JSON")
    parser.add_argument("--forecast", action="store_true", help="with --variant: print the forecast only")
    parser.add_argument("--mode", choices=MODES, default="lora_unet")
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    args.size = args.size or (1024 if args.model == "sdxl" else 64)
    if args.variant:
        print(json.dumps((forecast if args.forecast else one)(args)))
        return
    if args.model == "sdxl" and not torch.cuda.is_available():
        raise SystemExit("error: SDXL at full size needs a GPU; --model nano runs on any device")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.model}, {args.size} px, cached latents, {where}, torch {torch.__version__}; {args.steps} steps")
    measures = ("images/s", "x plain loop", "of the matmul rate", "peak GiB", "reserved", "forecast", "at the start")
    print(f"| mode | batch | | {' | '.join(measures)} |")
    print("|---" * (3 + len(measures)) + "|")
    cases = [{"mode": mode, "batch_size": size} for mode in args.modes for size in args.batch_sizes]
    with ThreadPoolExecutor(4) as pool:
        forecasts = [pool.submit(partial(line, args, "sdft", "--forecast", **case)) for case in cases]
        for case, planned in zip(cases, forecasts, strict=True):
            measured = partial(line, args, **case)
            bare = measured(PLAIN)
            row(case, PLAIN, bare, bare)
            for variant in args.variants:
                row(case, variant, measured(variant), bare, planned)


def row(
    case: dict[str, Any],
    name: str,
    values: dict[str, float] | str,
    bare: dict[str, float] | str,
    planned: Future | None = None,
) -> None:
    """One row of the table."""
    first = f"| {case['mode']} | {case['batch_size']} | {name} |"
    if isinstance(values, str):
        print(first, f"{values} | | | | | | |", flush=True)
        return
    ratio = f"{values['images_per_s'] / bare['images_per_s']:.2f}" if isinstance(bare, dict) else ""
    forecast_gib = planned.result() if planned else {}
    text = f"{forecast_gib.get('forecast_gib', float('nan')):.1f}" if isinstance(forecast_gib, dict) else forecast_gib
    memory = f"{values['memory_gib']:.1f} | {values['reserved_gib']:.1f} | {text} | {values['start_gib']:.1f}"
    print(first, f"{values['images_per_s']:.2f} | {ratio} | {values['share_of_matmul']:.0%} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
