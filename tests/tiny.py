"""SDXL so small that a step takes milliseconds, batches for it, and pictures of noise.

The model has SDXL's parts and topology with one resnet a level; every width differs where a mix-up would otherwise
pass. It knows nothing, and the same seed gives the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdft.batch import Batch
from sdft.data.source import Sample
from sdft.models.nano.build import scheduler, tokenizer
from sdft.models.sdxl import SDXL

WORDS = ("a", "photo", "of", "the", "red", "cat", "dog", "on", "table", "glowing", "neon", "lines")
CAPTIONS = ("a red cat", "a photo of the dog", "the cat on a table", "neon lines")
CONTEXT_WIDTHS = (16, 24)
NUM_LAYERS = (3, 2)
TIME_ID_WIDTH = 8
SIZE = 32
"""Side of the pictures in pixels; the latents are 8 x 8."""


def build_tiny_model(seed: int = 0, empty_prompt: str = "zeros") -> SDXL:
    tokenizers = [tokenizer(WORDS, "<|endoftext|>"), tokenizer(WORDS, "!")]
    configs = [
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 8,
            max_position_embeddings=77,
            projection_dim=CONTEXT_WIDTHS[1],
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
        for tok, width, num_layers in zip(tokenizers, CONTEXT_WIDTHS, NUM_LAYERS, strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 24, 24),
            layers_per_block=1,
            transformer_layers_per_block=1,
            attention_head_dim=(2, 3, 3),
            cross_attention_dim=sum(CONTEXT_WIDTHS),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + CONTEXT_WIDTHS[1],
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.5,
        )
        encoders = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
    model = SDXL(unet, vae, *encoders, *tokenizers, scheduler=scheduler(), empty_prompt=empty_prompt)
    return model.eval()


def build_tiny_batch(
    num: int = 2,
    dropped: Sequence[int] = (),
    captions: Sequence[str] = CAPTIONS,
    visits: Sequence[int] | None = None,
    loss_weights: Sequence[float] | None = None,
) -> Batch:
    g = torch.Generator().manual_seed(11)
    sizes = [(40.0 + i, 50.0, float(i), 2.0, float(SIZE), float(SIZE)) for i in range(num)]
    return Batch(
        keys=[f"picture {i}" for i in range(num)],
        visits=list(visits or [0] * num),
        captions=[captions[i % len(captions)] for i in range(num)],
        dropped_B=torch.tensor([i in dropped for i in range(num)]),
        time_ids_B6=torch.tensor(sizes),
        loss_weight_B=torch.tensor(loss_weights or [1.0] * num),
        pixels_BCHW=torch.rand(num, 3, SIZE, SIZE, generator=g) * 2 - 1,
    )


class TinySource:
    """`num` pictures of noise, a little wider than high, captioned in turn."""

    def __init__(self, num: int = 6, name: str = "noise", hw: tuple[int, int] = (SIZE, SIZE + 8)):
        self.keys = [f"{name}/{i}" for i in range(num)]
        self.images = np.random.default_rng(3).integers(0, 256, (num, *hw, 3), dtype=np.uint8)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.keys[index], self.images[index], CAPTIONS[index % len(CAPTIONS)])
