"""The SDXL family: encode images, encode prompts, denoise, decode.

Knows the networks and their conditioning; knows nothing of losses, tuning or sampling. The same class holds `nano` and
the real SDXL.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdft.batch import Batch, Conditioning
from sdft.hardware import send
from sdft.models.offload import alone_on_device
from sdft.models.words import ExtendedEmbedding, add_words
from sdft.protocols import DiffusionModel

EmptyPrompt = Literal["zeros", "empty"]


PIPELINE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONV_LAYERS = ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv")
ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ENCODER_ADAPTERS = {"attention": ENCODER_LAYERS[:4], "all": ENCODER_LAYERS, "conv": ENCODER_LAYERS}
TILE = 448
"""Side of a decoded tile in pixels."""
VAE_PIXELS = 2**20
"""Pixels that pass through the VAE at a time: one image of 1024 x 1024, some GiB in fp32."""
ENCODER_SHARDS = ("embeddings", "encoder", "final_layer_norm", "text_projection")
"""Submodules of a text encoder that are sharded: transformers checks the exact class of the encoder itself, which FSDP
would change."""


def on_device(*parts: str) -> Callable:
    """Decorates a method that needs `parts` on the UNet's device: offloaded ones are moved there for the call."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def run(self: SDXL, *args: Any, **kwargs: Any) -> Any:
            away = [part for name in parts if (part := getattr(self, name)).device != self.device]
            for part in away:
                part.to(self.device)
            try:
                return method(self, *args, **kwargs)
            finally:
                for part in away:
                    part.to("cpu")

        return run

    return decorate


class SDXL(DiffusionModel):
    """Stable Diffusion XL.

    empty_prompt: what a dropped caption and an absent negative prompt become: `zeros` (both embeddings zero, as the
    base model was trained) or `empty` (the encoded empty string). Training and sampling share it.
    prompt_chunks: 75-token chunks in which a prompt is read; the context is so many times 77 long, for every prompt.
    """

    PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
    DENOISER, VAE, TEXT_ENCODERS = "unet", "vae", ("text_encoder", "text_encoder_2")
    ADAPTER_LAYERS: ClassVar = {
        "unet": {"attention": UNET_LAYERS[:4], "all": UNET_LAYERS, "conv": UNET_LAYERS + CONV_LAYERS},
        "text_encoder": ENCODER_ADAPTERS,
        "text_encoder_2": ENCODER_ADAPTERS,
    }

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: Any,
        empty_prompt: EmptyPrompt = "zeros",
        prompt_chunks: int = 1,
    ):
        super().__init__()
        self.unet, self.vae = unet, vae
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.scheduler, self.empty_prompt, self.prompt_chunks = scheduler, empty_prompt, prompt_chunks
        vae.requires_grad_(False)

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def size_multiple(self) -> int:
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def context_encoders(self) -> Iterator[tuple[CLIPTokenizer, nn.Module]]:
        """(tokenizer, encoder) in the order in which their widths are concatenated."""
        yield self.tokenizer, self.text_encoder
        yield self.tokenizer_2, self.text_encoder_2

    def pipeline(self) -> StableDiffusionXLPipeline:
        zeros = self.empty_prompt == "zeros"
        parts = {part: getattr(self, part) for part in PIPELINE_PARTS}
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)

    def set_prediction_type(self, prediction: str, zero_terminal_snr: bool) -> None:
        config = dict(self.scheduler.config)
        # diffusers would restore the defaults of the keys listed here.
        config.pop("_use_default_values", None)
        config |= {"prediction_type": prediction, "rescale_betas_zero_snr": zero_terminal_snr}
        if zero_terminal_snr:
            config["timestep_spacing"] = "trailing"  # sampling starts at the last step, which is pure noise
        flow = prediction == "flow_prediction"
        # Of diffusers' flow schedulers, StableDiffusionXLPipeline can call this one: it has `scale_model_input`.
        scheduler = DPMSolverMultistepScheduler if flow else type(self.scheduler)
        self.scheduler = scheduler.from_config(config, **({"use_flow_sigmas": True} if flow else {}))

    def add_words(self, words: Mapping[str, str], vectors: Mapping[str, int] = {}) -> None:
        """Add `words` (word -> initial phrase) to both tokenizers, with trainable embeddings in both encoders."""
        self.word_vectors = {word: num for word, num in vectors.items() if num > 1}
        for tokenizer, encoder in self.context_encoders:
            encoder.set_input_embeddings(add_words(tokenizer, encoder.get_input_embeddings(), words, vectors))

    def _tokenize(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
        """Token ids of captions, B x chunks x 77; a word of several vectors stands for all of its tokens."""
        first_ids = {tokenizer.convert_tokens_to_ids(word): num for word, num in self.word_vectors.items()}
        return tokenize(tokenizer, captions, self.prompt_chunks, first_ids)

    @property
    def word_rows(self) -> dict[str, Tensor]:
        """Embeddings of new words, N x D, by the names `clip_l` and `clip_g` that other programs use."""
        encoders = {"clip_l": self.text_encoder, "clip_g": self.text_encoder_2}
        tables = {name: encoder.get_input_embeddings() for name, encoder in encoders.items()}
        return {name: table.rows_ND for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}

    def untrained_parameters(self, part: str) -> set[str]:
        """Of encoder 1, the last layer and the final norm: the context is its penultimate output."""
        if part != "text_encoder":
            return set()
        last = f"encoder.layers.{self.text_encoder.config.num_hidden_layers - 1}."
        names = (name for name, _ in self.text_encoder.named_parameters())
        return {name for name in names if last in name or "final_layer_norm" in name}

    def modules_to_shard(self, offloaded: Iterable[str]) -> list[nn.Module]:
        encoders = (self.get_submodule(name) for name in self.TEXT_ENCODERS if name not in {*offloaded})
        named = (pair for encoder in encoders for pair in encoder.named_modules())
        return [self.unet, *(module for name, module in named if name.split(".")[-1] in ENCODER_SHARDS)]

    @on_device("vae")
    def encode_moments(self, pixels_BCHW: Tensor) -> Tensor:
        """Posterior mean and log variance, stacked on C, in fp32: the VAE overflows in fp16."""
        moments = []
        with torch.no_grad(), torch.autocast(pixels_BCHW.device.type, enabled=False):
            for part_BCHW in pixels_BCHW.split(num_at_once(pixels_BCHW.shape[-2:])):
                posterior = self.vae.encode(part_BCHW.to(self.vae.device, self.vae.dtype)).latent_dist
                moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
        return torch.cat(moments)

    def encode_images(self, batch: Batch, eps_BCHW: Tensor | None = None) -> Tensor:
        """z0_BCHW: a posterior sample with standard normal `eps`, or its mean if None, scaled to unit variance."""
        moments = batch.moments_BCHW if batch.moments_BCHW is not None else self.encode_moments(batch.pixels_BCHW)
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if eps_BCHW is None else mean + (0.5 * logvar).exp() * eps_BCHW.to(mean)
        shift = self.vae.config.shift_factor or 0.0
        return (z - shift) * self.vae.config.scaling_factor

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        if batch.moments_BCHW is not None:
            _, channels, h, w = batch.moments_BCHW.shape
            return channels // 2, h, w
        assert batch.pixels_BCHW is not None
        *_, h, w = batch.pixels_BCHW.shape
        return self.latent_channels, h // self.vae_factor, w // self.vae_factor

    def prompt_ids(self, caption: str) -> list[list[list[int]]]:
        ids = (self._tokenize(tokenizer, [caption]) for tokenizer, _ in self.context_encoders)
        return [ids_1NL[0].tolist() for ids_1NL in ids]

    @on_device("text_encoder", "text_encoder_2")
    def encode_prompts(self, captions: Sequence[str], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(context_BLD, pooled_BP) from the penultimate layers of both encoders, without the final norm.

        Each chunk of a long prompt is encoded separately and L is the sum of their lengths; the pooled vector is that
        of the first chunk. dropped: bool, B, or B x E to drop the caption for single encoders.
        """
        dropped_BE = None if dropped is None else dropped.reshape(len(captions), -1).expand(-1, 2)
        contexts = []
        for place, (tokenizer, encoder) in enumerate(self.context_encoders):
            texts = captions
            if dropped_BE is not None and self.empty_prompt == "empty":
                emptied = dropped_BE[:, place].tolist()
                texts = ["" if empty else text for text, empty in zip(captions, emptied, strict=True)]
            ids_BNL = send(self._tokenize(tokenizer, texts), encoder.device)
            states = encoder(ids_BNL.flatten(0, 1), output_hidden_states=True)
            contexts.append(states.hidden_states[-2].unflatten(0, ids_BNL.shape[:2]).flatten(1, 2))
        # Not `text_embeds`: where the config has eos_token_id=2, as SDXL's does, transformers pools at the largest id,
        # which is that of a new word.
        first_eos_B = (ids_BNL[:, 0] == tokenizer.eos_token_id).int().argmax(dim=1)
        last_BLP = states.last_hidden_state.unflatten(0, ids_BNL.shape[:2])[:, 0]
        at_eos_BP = last_BLP[torch.arange(len(captions), device=encoder.device), first_eos_B]
        context_BLD, pooled_BP = torch.cat(contexts, dim=-1), encoder.text_projection(at_eos_BP)
        if dropped_BE is None:
            return context_BLD, pooled_BP
        return self._zero_dropped(context_BLD, pooled_BP, dropped_BE)

    def _zero_dropped(self, context_BLD: Tensor, pooled_BP: Tensor, dropped_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Zero the outputs of dropped encoders if `empty_prompt=zeros`; the pooled vector is encoder 2's."""
        if self.empty_prompt == "empty":
            return context_BLD, pooled_BP
        kept_BE = (~dropped_BE).to(context_BLD).expand(-1, 2)
        widths = [encoder.config.hidden_size for _, encoder in self.context_encoders]
        kept_BD = torch.cat([kept_BE[:, e, None].expand(-1, width) for e, width in enumerate(widths)], dim=1)
        return context_BLD * kept_BD[:, None], pooled_BP * kept_BE[:, 1:]

    def condition(self, batch: Batch) -> Conditioning:
        if batch.context_BLD is None:
            context_BLD, pooled_BP = self.encode_prompts(batch.captions, batch.dropped_by_encoder_BE)
        else:
            context_BLD, pooled_BP = self._zero_dropped(batch.context_BLD, batch.pooled_BP, batch.dropped_by_encoder_BE)
        return Conditioning(context_BLD, pooled_BP, batch.time_ids_B6)

    def condition_prompts(self, context_BLD: Tensor, pooled_BP: Tensor, size_hw: tuple[int, int]) -> Conditioning:
        """Original and target size are `size_hw`, without a crop."""
        time_ids = torch.tensor([(*size_hw, 0, 0, *size_hw)], dtype=torch.float32, device=context_BLD.device)
        return Conditioning(context_BLD, pooled_BP, time_ids.expand(len(context_BLD), -1))

    def denoise(self, z_t_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        dtype = next(self.unet.parameters()).dtype  # `unet.dtype` walks over all modules
        added = {"text_embeds": cond.pooled_BP.to(dtype), "time_ids": cond.time_ids_B6}
        prediction = self.unet(z_t_BCHW.to(dtype), t_B, cond.context_BLD.to(dtype), added_cond_kwargs=added)
        return prediction.sample.float()

    @on_device("vae")
    def decode(self, z_BCHW: Tensor) -> Tensor:
        shift = self.vae.config.shift_factor or 0.0
        images = []
        if self.decoded_tile:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size = self.decoded_tile
            self.vae.tile_latent_min_size = self.decoded_tile // self.vae_factor
        with alone_on_device(self, "vae"), torch.no_grad(), torch.autocast(z_BCHW.device.type, enabled=False):
            h, w = z_BCHW.shape[-2:]
            for part_BCHW in z_BCHW.split(num_at_once((h * self.vae_factor, w * self.vae_factor))):
                z = part_BCHW.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
                images.append(self.vae.decode(z).sample.float().clamp(-1, 1))
        self.vae.disable_tiling()  # encoding is always whole: latents are what training sees
        return torch.cat(images)


def num_at_once(size_hw: Sequence[int]) -> int:
    """Images that the VAE encodes or decodes at a time, so that memory does not grow with the batch.

    Not diffusers' `enable_slicing`, which takes one at a time whatever their size: slow for small images.
    """
    return max(1, VAE_PIXELS // (size_hw[0] * size_hw[1]))


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1, vectors: Mapping[int, int] = {}
) -> Tensor:
    """Token ids, B x chunks x 77, each chunk with its own begin, end and padding. Warns about truncated captions.

    vectors: first id of a word of several vectors -> their number; the other ids follow it.
    """
    room = tokenizer.model_max_length - 2
    rows = []
    for caption, ids in zip(captions, tokenizer(list(captions), add_special_tokens=False).input_ids, strict=True):
        if vectors:
            ids = [each for first in ids for each in range(first, first + vectors.get(first, 1))]
        if len(ids) > num_chunks * room:
            # Python shows a warning with the same text only once.
            warnings.warn(
                f"only {num_chunks * room} of {len(ids)} tokens of the prompt {caption!r} are read; "
                f"model.prompt_chunks={-(-len(ids) // room)} reads all of it",
                stacklevel=2,
            )
        for chunk in range(num_chunks):
            words = [tokenizer.bos_token_id, *ids[chunk * room : (chunk + 1) * room], tokenizer.eos_token_id]
            rows.append(words + [tokenizer.pad_token_id] * (room + 2 - len(words)))
    return torch.tensor(rows).view(len(captions), num_chunks, room + 2)
