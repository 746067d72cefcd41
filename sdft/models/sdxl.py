"""SDXL as four verbs: encode images, encode prompts, denoise, decode.

Knows the parts of the model and how they are conditioned; knows nothing of losses, tuning or sampling.
The same class holds `nano` and the real thing.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdft.batch import Batch, Conditioning
from sdft.models.words import ExtendedEmbedding, add_words

EmptyPrompt = Literal["zeros", "empty"]


def on_device(*parts: str) -> Callable:
    """A method that needs `parts` on the device of the UNet; those that were sent away go back there after it."""

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


class SDXL(nn.Module):
    """The parts of SDXL.

    empty_prompt: what a dropped caption and an absent negative prompt become: `zeros` (both embeddings zero, as the
    base model was trained) or `empty` (the encoded empty string). Training and sampling share it.
    prompt_chunks: 75-token chunks in which a prompt is read; the context is so many times 77 long, for every prompt.
    """

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
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def vae_factor(self) -> int:
        """Pixels a latent position covers along each axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def context_encoders(self) -> Iterator[tuple[CLIPTokenizer, nn.Module]]:
        """(tokenizer, encoder) in the order in which their widths are concatenated."""
        yield self.tokenizer, self.text_encoder
        yield self.tokenizer_2, self.text_encoder_2

    def set_prediction_type(self, prediction: str, zero_terminal_snr: bool) -> None:
        """Sample the way the model is trained: what the UNet predicts, and on which noise schedule."""
        config = dict(self.scheduler.config)
        # diffusers would put back the default of whatever is listed here.
        config.pop("_use_default_values", None)
        config |= {"prediction_type": prediction, "rescale_betas_zero_snr": zero_terminal_snr}
        if zero_terminal_snr:
            config["timestep_spacing"] = "trailing"  # sampling starts at the last step, where there is only noise
        self.scheduler = type(self.scheduler).from_config(config)

    def add_words(self, words: Mapping[str, str]) -> None:
        """Teach both tokenizers `words` (word -> initial phrase) and both encoders a learned row for each."""
        for tokenizer, encoder in self.context_encoders:
            encoder.set_input_embeddings(add_words(tokenizer, encoder.get_input_embeddings(), words))

    @property
    def word_rows(self) -> dict[str, Tensor]:
        """The learned rows of new words, N x D, under the names that other programs use; empty without new words."""
        encoders = {"clip_l": self.text_encoder, "clip_g": self.text_encoder_2}
        tables = {name: encoder.get_input_embeddings() for name, encoder in encoders.items()}
        return {name: table.rows_ND for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}

    def offload(self, *parts: str) -> None:
        """Take parts that each step can do without off the device; what needs them fetches them."""
        for part in parts:
            getattr(self, part).to("cpu")

    @on_device("vae")
    def encode_moments(self, pixels_BCHW: Tensor) -> Tensor:
        """Posterior mean and log variance, stacked on C, in fp32: the VAE overflows in fp16."""
        with torch.no_grad(), torch.autocast(pixels_BCHW.device.type, enabled=False):
            posterior = self.vae.encode(pixels_BCHW.to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def encode_images(self, batch: Batch, eps_BCHW: Tensor | None = None) -> Tensor:
        """z0_BCHW: a posterior draw (`eps` standard normal; None takes the mean), scaled to unit variance."""
        moments = batch.moments_BCHW if batch.moments_BCHW is not None else self.encode_moments(batch.pixels_BCHW)
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if eps_BCHW is None else mean + (0.5 * logvar).exp() * eps_BCHW.to(mean)
        shift = self.vae.config.shift_factor or 0.0
        return (z - shift) * self.vae.config.scaling_factor

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """C, H, W of the latents of a batch."""
        if batch.moments_BCHW is not None:
            _, channels, h, w = batch.moments_BCHW.shape
            return channels // 2, h, w
        assert batch.pixels_BCHW is not None
        *_, h, w = batch.pixels_BCHW.shape
        return self.vae.config.latent_channels, h // self.vae_factor, w // self.vae_factor

    def prompt_ids(self, caption: str) -> list[list[list[int]]]:
        """What each encoder reads of a caption, by chunks."""
        ids = (tokenize(tokenizer, [caption], self.prompt_chunks) for tokenizer, _ in self.context_encoders)
        return [ids_1NL[0].tolist() for ids_1NL in ids]

    @on_device("text_encoder", "text_encoder_2")
    def encode_prompts(self, captions: Sequence[str], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(context_BLD, pooled_BP). Both encoders give their penultimate layer, without the final norm.

        Each chunk of a long prompt is encoded by itself and L is their sum; the first chunk gives the pooled vector.
        dropped: bool, B, or B x E where an encoder can be told nothing while the other is.
        """
        dropped_by_encoder_BE = None if dropped is None else dropped.reshape(len(captions), -1).expand(-1, 2)
        contexts = []
        for place, (tokenizer, encoder) in enumerate(self.context_encoders):
            texts = captions
            if dropped_by_encoder_BE is not None and self.empty_prompt == "empty":
                silent = dropped_by_encoder_BE[:, place].tolist()
                texts = ["" if nothing else text for text, nothing in zip(captions, silent, strict=True)]
            ids_BNL = tokenize(tokenizer, texts, self.prompt_chunks).to(encoder.device)
            states = encoder(ids_BNL.flatten(0, 1), output_hidden_states=True)
            contexts.append(states.hidden_states[-2].unflatten(0, ids_BNL.shape[:2]).flatten(1, 2))
        # `text_embeds` will not do: where the config says eos_token_id=2, as SDXL's does, transformers pools at the
        # largest id, which a new word has.
        first_eos_B = (ids_BNL[:, 0] == tokenizer.eos_token_id).int().argmax(dim=1)
        last_BLP = states.last_hidden_state.unflatten(0, ids_BNL.shape[:2])[:, 0]
        at_eos_BP = last_BLP[torch.arange(len(captions), device=encoder.device), first_eos_B]
        context_BLD, pooled_BP = torch.cat(contexts, dim=-1), encoder.text_projection(at_eos_BP)
        if dropped_by_encoder_BE is None:
            return context_BLD, pooled_BP
        return self._silenced(context_BLD, pooled_BP, dropped_by_encoder_BE)

    def _silenced(self, context_BLD: Tensor, pooled_BP: Tensor, dropped_by_encoder_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for what silent encoders say, where `empty_prompt` asks for them; the last one gives the pooled."""
        if self.empty_prompt == "empty":
            return context_BLD, pooled_BP
        kept_BE = (~dropped_by_encoder_BE).to(context_BLD).expand(-1, 2)
        widths = [encoder.config.hidden_size for _, encoder in self.context_encoders]
        kept_BD = torch.cat([kept_BE[:, e, None].expand(-1, width) for e, width in enumerate(widths)], dim=1)
        return context_BLD * kept_BD[:, None], pooled_BP * kept_BE[:, 1:]

    def condition(self, batch: Batch) -> Conditioning:
        """Everything the UNet is told about a batch."""
        if batch.context_BLD is None:
            context_BLD, pooled_BP = self.encode_prompts(batch.captions, batch.dropped_by_encoder_BE)
        else:
            context_BLD, pooled_BP = self._silenced(batch.context_BLD, batch.pooled_BP, batch.dropped_by_encoder_BE)
        return Conditioning(context_BLD, pooled_BP, batch.time_ids_B6)

    def denoise(self, z_t_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The UNet's prediction, in fp32."""
        dtype = next(self.unet.parameters()).dtype  # `unet.dtype` looks at every module, at every step
        added = {"text_embeds": cond.pooled_BP.to(dtype), "time_ids": cond.time_ids_B6}
        prediction = self.unet(z_t_BCHW.to(dtype), t_B, cond.context_BLD.to(dtype), added_cond_kwargs=added)
        return prediction.sample.float()

    @on_device("vae")
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] of scaled latents."""
        shift = self.vae.config.shift_factor or 0.0
        with torch.no_grad(), torch.autocast(z_BCHW.device.type, enabled=False):
            z = z_BCHW.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
            return self.vae.decode(z).sample.float().clamp(-1, 1)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1) -> Tensor:
    """Token ids, B x chunks x 77, each chunk with its own begin, end and padding. What is cut off is said."""
    room = tokenizer.model_max_length - 2
    rows = []
    for caption, ids in zip(captions, tokenizer(list(captions), add_special_tokens=False).input_ids, strict=True):
        if len(ids) > num_chunks * room:
            # The same text warns once: this is the default of Python's warnings.
            warnings.warn(
                f"only {num_chunks * room} of {len(ids)} tokens are read of the prompt {caption!r}; "
                f"model.prompt_chunks={-(-len(ids) // room)} reads all of it",
                stacklevel=2,
            )
        for chunk in range(num_chunks):
            words = [tokenizer.bos_token_id, *ids[chunk * room : (chunk + 1) * room], tokenizer.eos_token_id]
            rows.append(words + [tokenizer.pad_token_id] * (room + 2 - len(words)))
    return torch.tensor(rows).view(len(captions), num_chunks, room + 2)
