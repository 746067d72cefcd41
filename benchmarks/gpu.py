"""Training SDXL, random weights: images/s, share of the matmul rate and peak memory, compared with a plain loop.

    python -m benchmarks.gpu                             # SDXL at 1024 px; needs a GPU
    python -m benchmarks.gpu --model nano --steps 4      # the same code on the shipped nano, on any device

Each line is a new process, so that memory and caches of the lines are independent. sdft's lines are the config that
`train.py` composes for the same words, with the callbacks that act at every step; the presets of `hardware=` are among
them. The plain loop is diffusers and PyTorch with the same weights, dtypes, checkpointing and average, written as a
tutorial would. Beside the peak stands what `dry_run` forecasts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdft.hardware import PRESETS

MODES = ("lora_unet", "lora_unet_te", "full")
VARIANTS: dict[str, list[str]] = {
    "sdft": [],
    "compile": ["model.compile=full"],
    "compile_blocks": ["model.compile=blocks"],
    "channels_last": ["model.channels_last=true"],
    "no_checkpointing": ["model.gradient_checkpointing=false"],
    "xformers": ["model.attention=xformers"],
    "eager": ["model.attention=eager"],
    "not_deterministic": ["trainer.deterministic=false"],
}
"""Lines of the table: what is changed of the recipe."""
FULL_PRESETS = ("12gb_full", "24gb_full")
PLAIN = "plain loop"
WARM_UP, PROFILED = 3, 5
CAPTION = "a photo of a cat"


class Noise:
    """A data source: pictures of noise, held in memory."""

    def __init__(self, num: int, size: int):
        self.keys = [str(i) for i in range(num)]
        self.size = size

    def __getitem__(self, index: int):
        from sdft.data.source import Sample

        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Sample(self.keys[index], pixels, CAPTION)


def config_of(args: argparse.Namespace, folder: str) -> DictConfig:
    """The config of a line, whose run folder is `folder`. A preset sets batch and accumulation by itself."""
    from sdft.api import compose

    words = [f"model={args.model}", f"tuning={args.mode}", f"size={args.size}", "verdict=none", "logger=csv"]
    words += [f"run_dir={folder}", "trainer.progress_bar=false", "lr_schedule=constant"]
    if args.hardware:
        words.append(f"hardware={args.hardware}")
    else:
        words += [f"data.batch_size={args.batch_size}", "trainer.accumulate_grad_batches=1"]
    cfg = compose("train", [*words, *VARIANTS.get(args.variant, ())])
    train, validation = (
        {"_target_": "benchmarks.gpu.Noise", "num": num, "size": args.size} for num in (max(8, cfg.data.batch_size), 1)
    )
    cfg.data.update(cache="ram", cache_dir=None, train=train, validation=validation)
    return cfg


def build_model(cfg: DictConfig, device: torch.device):
    """nano as shipped, or SDXL with random weights."""
    from sdft.config.command import build
    from sdft.models.load import SDXL_ID

    if cfg.model.weights == SDXL_ID:
        return random_sdxl(device, **{name: value for name, value in cfg.model.items() if name != "_target_"})
    return build(cfg.model).to(device)


def random_sdxl(
    device: torch.device,
    dtype: Mapping[str, str],
    quantization: Mapping[str, str],
    attention: Any,
    gradient_checkpointing: bool,
    channels_last: bool,
    compile: Any,
    offload_idle: bool,
    offload_blocks: Any,
    tiled_vae: bool,
    **_: Any,
):
    """What `pretrained` makes of these options, with random weights, and quickly, as they are made on the device.

    nano's tokenizers do: their ids are below SDXL's, and ends are found by the tokenizer's own mark.
    """
    from sdft.formats.architecture import PARTS, empty_network
    from sdft.models import load
    from sdft.models.quantized import quantize, quantize_layers
    from sdft.models.sdxl import SDXL

    quantized = load.quantized_parts(quantization, SDXL)  # type: ignore[arg-type]
    networks = {}
    for part in PARTS:
        network = empty_network(part, load.SDXL_BASE / part).to(load.part_dtypes(dtype)[part])  # type: ignore[arg-type]
        network.to_empty(device=device)
        for name, parameter in network.named_parameters():
            randomise(name, parameter.data)
        if part in quantized:
            format, suffixes = quantized[part]
            full = dict(network.named_parameters())
            for name, layer in quantize_layers(network, suffixes, format).items():
                values = quantize(full.pop(f"{name}.weight").data, format)
                layer.codes, layer.scales = (nn.Parameter(v, requires_grad=False) for v in values)
        networks[part] = network
    model = load.assemble(networks, load.SDXL_BASE, load.NANO, SDXL, 1, None, offload_idle, tiled_vae)
    load.set_up(model.unet, attention, gradient_checkpointing, offload_blocks, channels_last, compile)
    for encoder in (model.text_encoder, model.text_encoder_2):
        position_ids(encoder, device)
    return model


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


def ours(args: argparse.Namespace, cfg: DictConfig, device: torch.device) -> tuple[Any, Clock]:
    """The model, and the clock of its steps as `train.py` makes them."""
    import lightning as L

    from sdft.config.command import build
    from sdft.module import Finetuning

    clock = Clock(args, device)

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step > clock.done:  # an accumulated batch is no step
                clock.step_done()

    model = build_model(cfg, device)
    cfg.trainer.max_steps = clock.num_steps
    callbacks = [build(cfg.callbacks[name]) for name in ("ema", "guard")]
    loggers = [build(logger) for logger in cfg.logger.values()]
    trainer = build(cfg.trainer, callbacks=[*callbacks, Steps()], loggers=loggers)
    tuning, objective, optimizer, schedule, data = (
        build(cfg[name]) for name in ("tuning", "objective", "optimizer", "lr_schedule", "data")
    )
    trainer.fit(Finetuning(model, tuning, objective, optimizer, schedule, cfg.seed, cfg.fused_backward), data)
    return model.to(device), clock


def plain(args: argparse.Namespace, cfg: DictConfig, device: torch.device) -> tuple[Any, Clock]:
    """The model, and the clock of the same steps in the way of the public example scripts."""
    from sdft.config.command import build

    model = build_model(cfg, device)
    build(cfg.tuning).attach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    alphas_cumprod = model.scheduler.alphas_cumprod.to(device)
    moments_BCHW, time_ids_B6 = fake_latents(cfg, model, device)
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


def fake_latents(cfg: DictConfig, model, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of a batch of latents, and the sizes that SDXL is conditioned on."""
    side, channels, batch_size = cfg.size // model.vae_factor, model.latent_channels, cfg.data.batch_size
    generator = torch.Generator().manual_seed(0)
    moments_BCHW = torch.randn(batch_size, 2 * channels, side, side, generator=generator).to(device)
    sizes = [[cfg.size, cfg.size, 0, 0, cfg.size, cfg.size]] * batch_size
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


def flops_of_a_batch(cfg: DictConfig, model, device: torch.device) -> float:
    """Twice the forward for a LoRA, three times for a full step: a LoRA needs no gradient of the frozen weights."""
    from sdft.batch import Conditioning

    moments_BCHW, time_ids_B6 = fake_latents(cfg, model, device)
    with torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter:
        context, pooled = model.encode_prompts([CAPTION] * cfg.data.batch_size)
        before = counter.get_total_flops()
        z_BCHW, t_B = moments_BCHW.chunk(2, dim=1)[0], torch.zeros(cfg.data.batch_size, dtype=torch.long, device=device)
        model.denoise(z_BCHW, t_B, Conditioning(context, pooled, time_ids_B6))
    return (counter.get_total_flops() - before) * (2 if "Adapter" in cfg.tuning._target_ else 3)


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
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(args, folder)
        model, clock = (plain if args.variant == PLAIN else ours)(args, cfg, device)
    accumulated = cfg.trainer.accumulate_grad_batches
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else float("nan")
    model.unet._compiled_call_impl = None  # compiled kernels hide their FLOPs
    share = accumulated * flops_of_a_batch(cfg, model, device) / clock.seconds / matmul_rate(device)
    return {
        "batch_size": cfg.data.batch_size,
        "accumulated": accumulated,
        "images_per_s": accumulated * cfg.data.batch_size / clock.seconds,
        "share_of_matmul": share,
        "memory_gib": memory,
        "reserved_gib": reserved,
        "start_gib": clock.start_gib,
    }


def forecast(args: argparse.Namespace) -> dict[str, float]:
    """GiB that `dry_run` forecasts for the steps and the start of the line, without the allowance for libraries."""
    from sdft.planning.dry_run import planned
    from sdft.planning.footprint import memory_needs

    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(args, folder)
        cfg.preflight.memory, cfg.callbacks = 1, {"ema": cfg.callbacks.ema}  # planned for a GPU
        needs = memory_needs(*planned(cfg))
    return {"steps": needs.training / 2**30, "start": max(needs.training, needs.caching) / 2**30}


def line(args: argparse.Namespace, *flags: str, **changed: Any) -> dict[str, float] | str:
    """One line, measured in a separate process; the error if it fails."""
    values = {**vars(args), **changed}
    names = ("model", "size", "batch_size", "steps", "mode", "variant", "hardware")
    words = [f"--{name}={values[name]}" for name in names if values[name]]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, *flags]
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
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["lora_unet", "full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sdft", "compile"])
    parser.add_argument("--presets", nargs="*", choices=(*PRESETS, *FULL_PRESETS), default=[*PRESETS, *FULL_PRESETS])
    parser.add_argument("--profile", help="with --variant: file for the kernels of five more steps")
    parser.add_argument("--variant", choices=(PLAIN, *VARIANTS), help="print one line as JSON")
    parser.add_argument("--hardware", choices=(*PRESETS, *FULL_PRESETS), help="with --variant: the preset of the line")
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
    table(args)


def table(args: argparse.Namespace) -> None:
    """Print all lines, each when it has been measured; forecasts are made meanwhile."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.model}, {args.size} px, cached latents, {where}, torch {torch.__version__}; {args.steps} steps")
    measures = ("images/s", "x plain loop", "of the matmul rate", "peak GiB", "forecast", "at the start", "forecast")
    print(f"| mode | batch | | {' | '.join([*measures, 'reserved'])} |")
    print("|---" * (4 + len(measures)) + "|")
    bare: dict[tuple[str, int], float] = {}
    cases = [{"mode": mode, "batch_size": size} for mode in args.modes for size in args.batch_sizes]
    lines = [(variant, {**case, "variant": variant}) for case in cases for variant in (PLAIN, *args.variants)]
    for preset in args.presets:
        mode = "full" if preset in FULL_PRESETS else "lora_unet"
        lines.append((f"hardware={preset}", {"mode": mode, "variant": "sdft", "hardware": preset}))
    on_gpu = torch.cuda.is_available()
    with ThreadPoolExecutor(4 if on_gpu else 1) as pool:
        # The plain loop has the memory of sdft's line, but for what Lightning keeps.
        plans = [{**case, "variant": "sdft"} if name == PLAIN else case for name, case in lines]
        forecasts = [pool.submit(partial(line, args, "--forecast", **plan)) for plan in plans]
        if not on_gpu:
            wait(forecasts)  # which take the cores from what is measured
        for (name, case), planned in zip(lines, forecasts, strict=True):
            values = line(args, **case)
            if name == PLAIN and isinstance(values, dict):
                bare[case["mode"], case["batch_size"]] = values["images_per_s"]
            print(row(name, case, values, bare, planned), flush=True)


def row(
    name: str,
    case: Mapping[str, Any],
    values: Mapping[str, float] | str,
    bare: Mapping[tuple[str, int], float],
    planned: Future,
) -> str:
    """One row of the table. bare: mode and batch size -> images/s of the plain loop."""
    if isinstance(values, str):
        return f"| {case['mode']} | {case.get('batch_size', '')} | {name} | {values} | | | | | | | |"
    batch_size, accumulated = int(values["batch_size"]), int(values["accumulated"])
    batch = f"{batch_size} x {accumulated}" if accumulated > 1 else str(batch_size)
    beside = bare.get((case["mode"], batch_size))
    ratio = f"{values['images_per_s'] / beside:.2f}" if beside else ""
    gib, plan = {name: f"{values[f'{name}_gib']:.2f}" for name in ("memory", "start", "reserved")}, planned.result()
    steps, start = (plan, "") if isinstance(plan, str) else (f"{plan['steps']:.2f}", f"{plan['start']:.2f}")
    memory = f"{gib['memory']} | {steps} | {gib['start']} | {start} | {gib['reserved']}"
    speed = f"{values['images_per_s']:.2f} | {ratio} | {values['share_of_matmul']:.0%}"
    return f"| {case['mode']} | {batch} | {name} | {speed} | {memory} |"


if __name__ == "__main__":
    main()
