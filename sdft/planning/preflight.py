"""Forecast of a run from shapes alone: memory, time, and what cannot work. Nothing is loaded or written."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.hardware import available_memory
from sdft.models.quantized import num_weights, quantized_layers
from sdft.planning.footprint import MemoryNeeds, Setup, memory_needs
from sdft.protocols import DiffusionModel
from sdft.tuning.parameters import part_of
from sdft.types import Positive

GIB = 2**30
LIBRARIES = 1.0
"""GiB on a GPU for CUDA, cuDNN and fragmentation."""
HOST_LIBRARIES = {False: 0.8, True: 1.5}
"""GiB of a process for Python and its libraries, without and with CUDA."""
SHARE_OF_RATE = 0.4
"""Share of the rate of large matrix products that a training step is assumed to reach."""


class MemoryShortage(UserError):
    """A run that does not fit on the device.

    limit: GiB of the device. problem, remedy: the two halves of the message.
    """

    def __init__(self, limit: float, problem: str, remedy: str):
        super().__init__(f"{problem}; {remedy}")
        self.limit, self.problem, self.remedy = limit, problem, remedy


class Preflight:
    """Forecasts a run, and raises UserError for one that cannot work.

    memory: GiB of the GPU to plan for; if None, that of this machine's GPU, or no limit without one.
    host_memory: GiB of the machine's memory to plan for; if None, what this machine has left, where the plan is for it.
    tflops: rate of the GPU at matrix products in the run's precision, in TFLOP/s, such as 800 for an H100 in bf16;
        measured on this machine if None.
    """

    def __init__(
        self, memory: Positive | None = None, tflops: Positive | None = None, host_memory: Positive | None = None
    ):
        self.memory, self.tflops, self.host_memory = memory, tflops, host_memory

    def __call__(
        self, module: Any, data: Any, setup: Setup, num_averages: int, num_offloaded_averages: int = 0
    ) -> list[str]:
        """The lines to print. `module` was built inside `MetaBuild`, on the meta device."""
        refuse_precision(setup)
        refuse_batch(data, setup)
        needs = memory_needs(module, data, setup, num_averages, num_offloaded_averages)
        self.refuse_memory(needs, module, data, setup)
        run = describe_run(module, data, setup.max_steps, setup.accumulate, setup.num_devices)
        return [*describe_parts(module.model), *run, *self.describe_needs(needs, setup)]

    def limit(self, setup: Setup) -> float | None:
        """GiB of one device; None for no limit."""
        if self.memory is None and setup.on_gpu and torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory / GIB
        return self.memory

    def refuse_memory(self, needs: MemoryNeeds, module: Any, data: Any, setup: Setup) -> None:
        """Raise UserError where a step does not fit into memory, naming options that need less."""
        limit, wanted = self.limit(setup), self.wanted(needs, setup) / GIB
        self.refuse_host(needs, setup)
        if limit is None or wanted <= limit:
            return
        model, full = module.model, not module.tuning.trains_adapters
        denoiser = model.denoiser if isinstance(model, DiffusionModel) else None
        fixed = {*module.cached_parts(data.cache), "vae", *(module.tuning.parts if full else ())}
        scales = {f"{name}.scales" for name, _ in quantized_layers(model)}
        frozen = (n for n, p in model.named_parameters() if p.itemsize > 2 and not p.requires_grad and n not in scales)
        wide = {part_of(name) for name in frozen} - fixed
        narrow = ", ".join(f"{part}: bf16" for part in sorted(wide))
        remedies = {
            "model.gradient_checkpointing=true": denoiser is not None and not denoiser.is_gradient_checkpointing,
            f"'model.dtype={{{narrow}}}'": bool(wide),
            "data.batch_size=1 with trainer.accumulate_grad_batches": data.batch_size > 1,
            "tuning=lora_unet": full,
            "strategy=fsdp": setup.num_shards == 1 and setup.num_devices > 1,
        }
        offered = [remedy for remedy, helps in remedies.items() if helps]
        remedy = f"set {' or '.join(offered)}" if offered else "train at a smaller size or rank, or on a larger GPU"
        raise MemoryShortage(limit, f"the run needs {wanted:.1f} GiB on each GPU and there are {limit:.1f}", remedy)

    def wanted(self, needs: MemoryNeeds, setup: Setup) -> float:
        """Bytes that a run needs on each device."""
        return needs.total + (LIBRARIES * GIB if setup.on_gpu else 0)

    def host_needs(self, needs: MemoryNeeds, setup: Setup) -> float:
        """Bytes that the processes of a run need on each machine."""
        return (needs.host + HOST_LIBRARIES[setup.on_gpu] * GIB) * setup.num_devices / setup.num_nodes

    def host_limit(self) -> float | None:
        """GiB of the machine: given, or what this one has left if the run is planned for it; None if unknown."""
        if self.host_memory is not None:
            return self.host_memory
        free = available_memory() / GIB
        return free if self.memory is None and free < float("inf") else None

    def refuse_host(self, needs: MemoryNeeds, setup: Setup) -> None:
        """Raise UserError if the machine has too little memory; the system would kill the run."""
        limit, wanted = self.host_limit(), self.host_needs(needs, setup) / GIB
        if limit is not None and wanted > limit:
            what = f"the run needs {wanted:.1f} GiB of the machine's memory and there are {limit:.1f}"
            raise UserError(f"{what}; close other programs, or set bf16 for frozen parts in model.dtype")

    def rate(self, setup: Setup) -> float:
        """FLOP/s of large matrix products: given, or measured here."""
        return self.tflops * 1e12 if self.tflops else measured_rate(setup.precision)

    def figures(self, needs: MemoryNeeds, setup: Setup, timed: bool) -> dict[str, float]:
        """`device_gib` of each GPU, if there is one, `host_gib` of each machine, and `train_seconds`.

        timed: whether the time is forecast, for which the rate of this machine may have to be measured.
        """
        found = {"device_gib": self.wanted(needs, setup) / GIB} if setup.on_gpu else {}
        found["host_gib"] = self.host_needs(needs, setup) / GIB
        if timed:
            seconds = needs.flops * setup.accumulate / (self.rate(setup) * SHARE_OF_RATE)
            found["train_seconds"] = seconds * setup.max_steps
        return found

    def describe_host(self, needs: MemoryNeeds, setup: Setup) -> list[str]:
        """Memory of the machine."""
        limit = self.host_limit()
        of = f" of {limit:.1f} free" if limit else ""
        processes = setup.num_devices // setup.num_nodes
        each = f", {processes} processes" if processes > 1 else ""
        return [f"  memory of the machine: {self.host_needs(needs, setup) / GIB:.2f} GiB{of}{each}"]

    def describe_needs(self, needs: MemoryNeeds, setup: Setup) -> list[str]:
        """Memory and time."""
        stages = {"training": needs.training, "caching": needs.caching, "drawing": needs.drawing}
        most = max(stages, key=stages.__getitem__)
        sums = {
            "weights": needs.weights,
            "gradients": needs.gradients,
            "optimizer": needs.states,
            "average": needs.average,
            "activations" if needs.step > needs.update else "update": max(needs.step, needs.update),
        }
        if setup.on_gpu:
            sums["libraries"] = LIBRARIES * GIB
        limit = self.limit(setup)
        of = f" of {limit:.1f}" if limit else ""
        rate = self.rate(setup)
        seconds = needs.flops * setup.accumulate / (rate * SHARE_OF_RATE)
        where = "given" if self.tflops else "measured here; preflight.tflops=... sets another device's"
        return [
            f"  memory of each device: {self.wanted(needs, setup) / GIB:.2f} GiB{of}, while {most}",
            f"  in training: {sum(sums.values()) / GIB:.2f} GiB = "
            + " + ".join(f"{name} {value / GIB:.2f}" for name, value in sums.items() if value),
            *self.describe_host(needs, setup),
            f"  time of a step: {seconds:.3g} s = {needs.flops * setup.accumulate / 1e12:.4g} TFLOP at "
            f"{SHARE_OF_RATE:.0%} of {rate / 1e12:.3g} TFLOP/s ({where})",
            f"  time of the run: {seconds * setup.max_steps / 60:.3g} min, without validation and previews",
        ]


def describe_run(module: Any, data: Any, max_steps: int, accumulate: int, num_devices: int) -> list[str]:
    """The run in a few lines: images, trainable parameters, batches and steps."""
    num_images = len(data.train_set.source.keys)
    per_step = data.batch_size * accumulate * num_devices
    lines = [f"  left out: {name} ({problem})" for name, problem in data.skipped]
    lines += [f"  left out: {line}" for line in data.left_out]
    if data.bucketed:
        lines.append("  sizes (w x h), with the steps of a pass:")
        for (h, w), indices in data.train_set.by_size().items():
            lines.append(f"    {w}x{h}: {len(indices)} images, {-(-len(indices) // per_step)} steps")
    count_of = num_weights(module.model)
    total = sum(count_of(name, p) for name, p in module.model.named_parameters())
    trained: dict[str, int] = {}
    for group in module.tuning.groups(module.model):
        trained[group["name"]] = trained.get(group["name"], 0) + sum(p.numel() for p in group["params"])
    for name, count in trained.items():
        lines.append(f"  trains {name}: {count:,} of {total:,} parameters ({count / total:.2%})")
    lines.append(
        f"  effective batch {per_step} ({data.batch_size} x {accumulate} accumulated x {num_devices} devices), "
        f"{max_steps} steps = {max_steps * per_step / num_images:.1f} passes over {num_images} images"
    )
    return lines


def describe_parts(model: nn.Module) -> list[str]:
    """Parameters and dtypes of each part."""
    parts: dict[str, list[Tensor]] = {}
    counts, count_of = dict[str, int](), num_weights(model)
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
        counts[part_of(name)] = counts.get(part_of(name), 0) + count_of(name, parameter)
    formats = {part_of(f"{name}.codes"): layer.format for name, layer in quantized_layers(model)}
    lines = []
    for part, owned in parts.items():
        count, kinds = counts[part], sorted({str(p.dtype).removeprefix("torch.") for p in owned})
        if part in formats:
            kinds = [formats[part], *(kind for kind in kinds if "int8" not in kind)]
        trained = sum(p.numel() for p in owned if p.requires_grad)
        size = sum(p.nbytes for p in owned) / GIB
        lines.append(f"  {part:15} {count:>13,} parameters, {size:.2f} GiB {'+'.join(kinds)}, {trained:,} trainable")
    return lines


def refuse_precision(setup: Setup) -> None:
    """Raise UserError for bf16 on a GPU that has none."""
    here = setup.on_gpu and torch.cuda.is_available()
    if here and setup.precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"trainer.precision={setup.precision}: {name} has no bf16; set trainer.precision=16-mixed")


def refuse_batch(data: Any, setup: Setup) -> None:
    """Raise UserError where one step would contain an image twice."""
    num_images, batches = len(data.train_set.source.keys), setup.accumulate * setup.num_devices
    if data.batch_size * batches > num_images:
        fitting = num_images // batches
        remedy = f"data.batch_size={fitting}" if fitting else "fewer devices or trainer.accumulate_grad_batches=1"
        raise UserError(
            f"data.batch_size={data.batch_size}: a step takes {data.batch_size * batches} images "
            f"({data.batch_size} x {setup.accumulate} accumulated x {setup.num_devices} devices) and there are "
            f"{num_images}; set {remedy}, or add images"
        )


def measured_rate(precision: str) -> float:
    """FLOP/s of a large matrix product on this machine, in the precision of the run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16 if "16" in precision else torch.float32
    a = torch.zeros(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)
