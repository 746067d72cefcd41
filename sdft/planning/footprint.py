"""Memory and FLOPs of a training step on one device, estimated by tracing a step with fake tensors.

Estimates only; `preflight` decides what is too much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sdft.batch import REJECTED, Batch
from sdft.data.pairs import PairDataset
from sdft.hardware import autocast_precision
from sdft.models.streaming import on_host, streams
from sdft.planning.allocations import AllocationTracker
from sdft.planning.repeated import RepeatedBlocks
from sdft.planning.updates import Kind, optimizer_memory, trained_here_and_there, update_in_backward
from sdft.protocols import DiffusionModel
from sdft.rng import Draws
from sdft.tuning.parameters import part_of, trainable_parameters
from sdft.types import DTYPES

ENCODE_WORKSPACE, DECODE_WORKSPACE = 1.2, 1.6
"""Memory of the VAE on a GPU relative to its tensors, for the workspace of cuDNN's convolutions: an H200 took 3.0 GiB
to encode and 4.8 GiB to decode an image of 1024 px, whose tensors have 2.5 and 3.0 GiB."""
ENCODED = 64
"""Images that are on the device at a time while the cache is filled."""


@dataclass(frozen=True)
class Setup:
    """Size and layout of a run.

    max_steps: optimizer steps. accumulate: batches per step. precision: Lightning's name of it.
    num_devices: processes. num_shards: processes that share one copy of the weights. num_nodes: machines.
    num_drawn, drawn_side: images of previews and the evaluation that are drawn at a time, and their side in pixels.
    """

    max_steps: int
    accumulate: int
    precision: str
    num_devices: int
    num_shards: int
    on_gpu: bool
    num_nodes: int = 1
    num_drawn: int = 0
    drawn_side: int = 0


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on one device, FLOPs of one batch there, and bytes on the host."""

    weights: float
    gradients: float
    states: float
    average: float
    """Averages of the weights that are kept on the device."""
    step: float
    """Peak of the forward and backward pass: activations, weights cast to another dtype, temporary gradients."""
    update: float
    """Temporary memory of the optimizer step."""
    flops: float
    caching: float = 0.0
    """Total of the stage before training, in which the VAE encodes the images, where their latents are cached."""
    drawing: float = 0.0
    """Total while the images of previews and of the evaluation are denoised and decoded."""
    host: float = 0.0
    """The most that one process holds in the memory of the machine, without libraries."""

    @property
    def held(self) -> float:
        """What training holds between two batches; gradients may be left from the batch before."""
        return self.weights + self.gradients + self.states + self.average

    @property
    def training(self) -> float:
        """Forward and backward never overlap the optimizer step."""
        return self.held + max(self.step, self.update)

    @property
    def total(self) -> float:
        """The most of the three stages."""
        return max(self.training, self.caching, self.drawing)


class MetaBuild(TorchFunctionMode):
    """Inside, a model on the meta device can be built and get adapters: `Tensor.cpu` leaves tensors on meta."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.cpu:
            return args[0]
        return function(*args, **(kwargs or {}))


def memory_needs(
    module: Any, data: Any, setup: Setup, num_averages: int, num_offloaded_averages: int = 0
) -> MemoryNeeds:
    """Memory and FLOPs of one device. FSDP shards weights, gradients, optimizer states and average.

    num_averages, num_offloaded_averages: averages of the weights (fp32), on the device and on the host.
    """
    offloaded = module.cached_parts(data.cache)
    tensors = [*module.model.named_parameters(), *module.model.named_buffers()]
    away = on_host(module.model)
    held = [t for name, t in tensors if part_of(name) not in offloaded and t not in away]
    trainable = trained_here_and_there(module.model)
    trained, hosted = (sum(p.nbytes for p in group) for group in trainable)
    average, hosted_average = (4 * sum(p.numel() for p in group) for group in trainable)
    optimizer = optimizer_memory(module, setup.on_gpu)
    everything = sum(t.nbytes for _, t in tensors)
    autoencoder = sum(t.nbytes for name, t in tensors if part_of(name) == getattr(module.model, "VAE", None))
    alone = setup.on_gpu and getattr(module.model, "offload_idle", False)
    traces = trace(module, data, setup, optimizer.updates if module.fused_backward else {})
    needs = MemoryNeeds(
        weights=sum(t.nbytes for t in held) / setup.num_shards + traces.slots,
        gradients=0 if module.fused_backward else trained / setup.num_shards,
        states=optimizer.states / setup.num_shards,
        average=num_averages * average / setup.num_shards,
        step=traces.step,
        update=optimizer.step / setup.num_shards,
        flops=traces.flops,
        caching=traces.encode and traces.encode + (autoencoder if alone else everything / setup.num_shards),
    )
    if draws_images(module.model, setup):
        frozen = sum(t.nbytes for t in held if not t.requires_grad) / setup.num_shards
        decoding = traces.decode + (autoencoder - frozen if alone else autoencoder * ("vae" in offloaded))
        needs = replace(needs, drawing=needs.held + max(traces.denoise, decoding))
    # Full tuning keeps the initial weights, and while the base model draws, the tuned ones too.
    kept = everything - sum(t.nbytes for t in held) + cached_bytes(module, data)
    kept += 0 if module.tuning.trains_adapters else 1.5 * (trained + hosted)
    kept += num_offloaded_averages * average + (num_averages + num_offloaded_averages) * hosted_average
    kept += optimizer.hosted_states + (0 if module.fused_backward else hosted)
    host = max(everything, kept) if setup.on_gpu else needs.total + kept
    return replace(needs, host=host)


def cached_bytes(module: Any, data: Any) -> int:
    """Bytes of the latents that `data.cache=ram` keeps."""
    if data.cache != "ram" or not isinstance(module.model, DiffusionModel):
        return 0
    factor, channels = module.model.vae_factor, 2 * module.model.latent_channels
    return sum(
        4 * channels * (h // factor) * (w // factor) * len(indices)
        for dataset, _ in data.parts()
        for (h, w), indices in dataset.by_size().items()
    )


class Traces(NamedTuple):
    """Peak bytes of what the stages compute, without weights, and the FLOPs of a training step.

    slots: room for the weights of blocks that are copied to the device when they run.
    """

    step: int
    flops: int
    slots: int
    encode: int
    denoise: int
    decode: int


def trace(module: Any, data: Any, setup: Setup, updates: Mapping[Kind, float]) -> Traces:
    """Trace the forward and backward pass of one batch with the largest images, and the other stages of a run.

    updates: temporary bytes of the weights that are updated during the backward pass.
    """
    precision = autocast_precision(setup.precision)
    narrow = None if precision == "fp32" else DTYPES[precision]
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        module.model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))  # `to_empty` takes long
        away = on_host(module.model)
        for _, parameter in trainable_parameters(module.model):
            if updates:
                size = 0 if parameter in away else updates[tuple(parameter.shape), parameter.dtype]
                parameter.register_post_accumulate_grad_hook(update_in_backward(size))
            else:
                parameter.grad = torch.zeros_like(parameter)
        if narrow is not None and setup.on_gpu:
            for norm in module.model.modules():
                if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                    norm.forward = norm_in_fp32(norm)  # type: ignore[method-assign]
        slots = [slot for stream in streams(module.model) for slot in stream.allocate(torch.device("cpu"))]
        batch = fake_batch(module, data)
        stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
        ledger = stack.enter_context(AllocationTracker(module.model, tensors=slots))
        repeated = stack.enter_context(RepeatedBlocks(module.model, ledger))
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            draws = Draws(0, batch.keys, batch.visits)
            module.tuning.seed_dropout(draws, torch.device("cpu"))
            report = module.objective(module.model, batch, draws)
            loss = report.per_sample_B.mean()
            del report
        repeated.end_autocast()
        loss.backward()
        step, flops = ledger.peak, ledger.flops
        encode = trace_encoding(module, data, setup, ledger) if module.cached_parts(data.cache) else 0
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            drawn = draws_images(module.model, setup)
            denoise, decode = trace_drawing(module.model, setup, ledger) if drawn else (0, 0)
    return Traces(step, flops, sum(slot.nbytes for slot in slots), encode, denoise, decode)


def draws_images(model: Any, setup: Setup) -> bool:
    """Whether previews or the evaluation draw images: single networks, such as nano's VAE, cannot."""
    return setup.num_drawn > 0 and isinstance(model, DiffusionModel)


def trace_encoding(module: Any, data: Any, setup: Setup, ledger: AllocationTracker) -> int:
    """Peak bytes while the VAE encodes the largest images for the cache. Inside of FakeTensorMode."""
    h, w = max(data.train_set.by_size(), key=lambda hw: hw[0] * hw[1])
    ledger.peak = start = ledger.now
    module.model.encode_moments(torch.zeros(min(ENCODED, len(data.train_set.source.keys)), 3, h, w))
    return round((ledger.peak - start) * (ENCODE_WORKSPACE if setup.on_gpu else 1))


def trace_drawing(model: DiffusionModel, setup: Setup, ledger: AllocationTracker) -> tuple[int, int]:
    """Peak bytes of a denoising step with guidance, and of decoding, of one batch of images. In FakeTensorMode."""
    num, side = setup.num_drawn, setup.drawn_side // model.size_multiple * model.size_multiple
    ledger.peak = start = ledger.now
    with torch.no_grad():
        z_BCHW = torch.zeros(num, model.latent_channels, side // model.vae_factor, side // model.vae_factor)
        context_BLD, pooled_BP = model.encode_prompts(["a photo of a cat"] * 2 * num)
        cond = model.condition_prompts(context_BLD, pooled_BP, (side, side))
        model.denoise(torch.cat([z_BCHW, z_BCHW]), torch.zeros(2 * num), cond)
        denoise, ledger.peak = ledger.peak - start, ledger.now
        tile = min(side, model.decoded_tile or side) // model.vae_factor
        model.decode(z_BCHW[:, :, :tile, :tile])  # other tiles have the same memory one after another
    return denoise, round((ledger.peak - start) * (DECODE_WORKSPACE if setup.on_gpu else 1))


def fake_batch(module: Any, data: Any) -> Batch:
    """A batch of zeros as the run would read it, with its largest images."""
    h, w = max(data.train_set.by_size(), key=lambda hw: hw[0] * hw[1])
    num = data.batch_size
    batch = Batch(
        keys=[str(i) for i in range(num)],
        visits=[0] * num,
        captions=[data.train_set.source[0].caption] * num,
        dropped_B=torch.zeros(num, dtype=torch.bool),
        time_ids_B6=torch.zeros(num, 6),
        loss_weight_B=torch.ones(num),
    )
    model, cached = module.model, module.cached_parts(data.cache)
    if not cached:
        batch.pixels_BCHW = torch.zeros(num, 3, h, w)
        return with_rejected(batch, data)
    f = model.vae_factor
    batch.moments_BCHW = torch.zeros(num, 2 * model.latent_channels, h // f, w // f)
    if cached >= {*model.TEXT_ENCODERS}:
        with torch.no_grad():
            batch.context_BLD, batch.pooled_BP = model.encode_prompts(batch.captions)
    return with_rejected(batch, data)


def with_rejected(batch: Batch, data: Any) -> Batch:
    """The batch with rejected pictures like its own, if the data has pairs."""
    if not isinstance(data.train_set, PairDataset):
        return batch
    return replace(batch, **{name: getattr(batch, name.removeprefix("rejected_")) for name in REJECTED})


def norm_in_fp32(norm: nn.GroupNorm | nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """A norm as autocast computes it on a GPU: in fp32. On a CPU, autocast leaves norms in bf16."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (norm.weight, norm.bias))
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    return forward
