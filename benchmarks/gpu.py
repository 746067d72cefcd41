"""Training SDXL, random weights: images/s, share of the matmul rate and peak memory, compared with a plain loop.

    python -m benchmarks.gpu                             # SDXL at 1024 px; needs a GPU
    python -m benchmarks.gpu --model nano --steps 4      # the same code on the shipped nano, on any device

Each line is a new process, so that memory and caches of the lines are independent. The plain loop is diffusers and
PyTorch with the same weights, dtypes and checkpointing, written as a tutorial would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

MODES = ("lora_unet", "lora_unet_te", "full")
ATTENTIONS = ("sdpa", "xformers", "eager")
WARM_UP = 2
CAPTION = "a photo of a cat"


def build_model(name: str, mode: str, attention: str, device: torch.device):
    """nano as shipped, or SDXL with random weights, the frozen parts in bf16."""
    from sdft.formats.architecture import PARTS, empty_network
    from sdft.models.attention import set_attention
    from sdft.models.load import SDXL_BASE, pretrained
    from sdft.models.sdxl import SDXL

    model = pretrained("nano")
    if name == "sdxl":
        networks = {}
        for part in PARTS:
            trainable = mode == "full" and part == "unet"
            network = empty_network(part, SDXL_BASE / part).to_empty(device=device)
            networks[part] = network.to(torch.float32 if trainable or part == "vae" else torch.bfloat16)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        # The tokenizers of nano do: their ids are below SDXL's, and ends are found by the tokenizer's own mark.
        model = SDXL(**networks, tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, scheduler=model.scheduler)
        model.unet.enable_gradient_checkpointing()
        for encoder in (model.text_encoder, model.text_encoder_2):
            position_ids(encoder, device)
    set_attention(model.unet, attention)
    return model.to(device)


def position_ids(encoder, device: torch.device) -> None:
    """The one buffer of an encoder, which empty networks leave undefined on another device."""
    embeddings = encoder.get_submodule("text_model.embeddings" if hasattr(encoder, "text_model") else "embeddings")
    embeddings.position_ids = torch.arange(77, device=device)[None]


def fake_batch(model, size: int, batch_size: int, device: torch.device):
    """A batch whose latents are cached."""
    from sdft.batch import Batch

    side, channels = size // model.vae_factor, model.vae.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    return Batch(
        keys=[str(i) for i in range(batch_size)],
        visits=[0] * batch_size,
        captions=[CAPTION] * batch_size,
        dropped_B=torch.zeros(batch_size, dtype=torch.bool),
        time_ids_B6=torch.tensor([[size, size, 0, 0, size, size]] * batch_size, dtype=torch.float32),
        loss_weight_B=torch.ones(batch_size),
        moments_BCHW=torch.randn(batch_size, 2 * channels, side, side, generator=generator),
    ).to(device)


def tuning_of(mode: str):
    """The tuning of a mode, as the config builds it."""
    from sdft.tuning.adapter import Adapter
    from sdft.tuning.full import Full

    parts = ("unet", "text_encoder", "text_encoder_2") if mode == "lora_unet_te" else ("unet",)
    return Full() if mode == "full" else Adapter(rank=16, parts=parts)


def ours(args: argparse.Namespace, device: torch.device):
    """A function that makes one step as `train.py` does, through the LightningModule."""
    from sdft.module import Finetuning
    from sdft.objective.denoising import Denoising
    from sdft.objective.weighting import MinSNR
    from sdft.optimizers.optimizers import adamw
    from sdft.optimizers.schedules import constant

    model = build_model(args.model, args.mode, args.attention, device)
    objective, optimizer = Denoising("epsilon", weighting=MinSNR()), partial(adamw, lr=1e-5)
    module = Finetuning(model, tuning_of(args.mode), objective, optimizer, constant, seed=0).to(device)
    batch = fake_batch(model, args.size, args.batch_size, device)
    module.log_dict = module.log = lambda *_, **__: None  # outside a Trainer there is no logger
    optimizer = optimizer(module.tuning.groups(model))
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = module.training_step(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, batch, step


def plain(args: argparse.Namespace, device: torch.device):
    """A function that makes the same step in the way of the public example scripts."""
    model = build_model(args.model, args.mode, args.attention, device)
    batch = fake_batch(model, args.size, args.batch_size, device)
    tuning_of(args.mode).attach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    alphas_cumprod = model.scheduler.alphas_cumprod.to(device)

    def step() -> None:
        mean, logvar = batch.moments_BCHW.chunk(2, dim=1)
        z0 = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * model.vae.config.scaling_factor
        eps, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=device)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            context, pooled = model.encode_prompts(batch.captions)
            added = {"text_embeds": pooled, "time_ids": batch.time_ids_B6}
            z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
            prediction = model.unet(z_t, t, context, added_cond_kwargs=added).sample
            loss = F.mse_loss(prediction.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, batch, step


def flops_of_a_step(model, batch, mode: str) -> float:
    """Twice the forward for a LoRA, three times for a full step: a LoRA needs no gradient of the frozen weights."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cond = model.condition(batch)
        before = counter.get_total_flops()
        z_BCHW = batch.moments_BCHW.chunk(2, dim=1)[0]
        model.denoise(z_BCHW, torch.zeros(len(batch), dtype=torch.long, device=z_BCHW.device), cond)
    return (counter.get_total_flops() - before) * (3 if mode == "full" else 2)


def matmul_rate(device: torch.device) -> float:
    """Measured bf16 matmul, FLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / median_seconds(lambda: a @ a, 10, device)


def median_seconds(function, num: int, device: torch.device) -> float:
    """Median seconds of a call, after some warm-up calls."""
    times = []
    for _ in range(num + WARM_UP):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM_UP:])


def one(args: argparse.Namespace) -> dict[str, float]:
    """The measurements of one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch, step = (plain if args.loop == "plain" else ours)(args, device)
    seconds = median_seconds(step, args.steps, device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    rate = matmul_rate(device)
    return {
        "images_per_s": args.batch_size / seconds,
        "share_of_matmul": flops_of_a_step(model, batch, args.mode) / seconds / rate,
        "memory_gib": memory,
    }


def line(args: argparse.Namespace, mode: str, attention: str, loop: str) -> dict[str, float] | str:
    """One line, measured in a separate process; the error if it fails."""
    words = [f"--{name}={getattr(args, name)}" for name in ("model", "size", "batch_size", "steps")]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--one", mode, attention, loop]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """The table, or one line of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("sdxl", "nano"), default="sdxl")
    parser.add_argument("--size", type=int, default=0, help="side of the pictures; 1024, or 64 for nano")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--one", nargs=3, metavar=("MODE", "ATTENTION", "LOOP"))
    args = parser.parse_args()
    args.size = args.size or (1024 if args.model == "sdxl" else 64)
    if args.one:
        args.mode, args.attention, args.loop = args.one
        print(json.dumps(one(args)))
        return
    if args.model == "sdxl" and not torch.cuda.is_available():
        raise SystemExit("error: SDXL at full size needs a GPU; --model nano runs on any device")
    print(f"{args.model}, {args.size} px, batch {args.batch_size}, bf16, cached latents; median of {args.steps} steps")
    print("| mode | attention | images/s | x plain loop | of the matmul rate | peak GiB |\n|---|---|---|---|---|---|")
    for mode in args.modes:
        bare = line(args, mode, "sdpa", "plain")
        row(mode, "plain loop", bare, bare)
        for attention in args.attentions:
            row(mode, attention, line(args, mode, attention, "ours"), bare)


def row(mode: str, name: str, values: dict[str, float] | str, bare: dict[str, float] | str) -> None:
    """One row of the table."""
    if isinstance(values, str):
        print(f"| {mode} | {name} | {values} | | | |", flush=True)
        return
    ratio = f"{values['images_per_s'] / bare['images_per_s']:.2f}" if isinstance(bare, dict) else ""
    share, memory = values["share_of_matmul"], values["memory_gib"]
    print(f"| {mode} | {name} | {values['images_per_s']:.2f} | {ratio} | {share:.0%} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
