"""nano: a small model with SDXL's architecture, untrained.

The classes of diffusers and transformers and the topology are SDXL's, so that every weight key is one of SDXL's.
Widths and padding tokens differ on purpose, so that tests notice when two of them are confused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from sdft.errors import UserError
from sdft.models.sdxl import SDXL
from sdft.types import Count

LATENT_SIZE = 16
IMAGE_SIZE = 8 * LATENT_SIZE
CONTEXT_WIDTHS = (48, 80)
TIME_ID_WIDTH = 32
CLIP_WIDTH = 96


def autoencoder() -> AutoencoderKL:
    """A VAE with four channels and SDXL's factor of 8. Equal upper widths keep the shortcut keys a subset of SDXL's."""
    widths = (16, 32, 128, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        force_upcast=True,
    )


def unet() -> UNet2DConditionModel:
    """SDXL's three levels with two resnets each; transformers of depth 1 instead of 2 and 10."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=2,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3, 3),
        cross_attention_dim=sum(CONTEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + CONTEXT_WIDTHS[1],
        norm_num_groups=16,
    )


def tokenizer(words: Sequence[str], pad_token: str, size: int = 0) -> CLIPTokenizer:
    """CLIP's byte-level BPE in which each of `words` is one token; any other text falls back to bytes.

    A word is added by merging what the present merges leave of it, left to right. Later merges rank lower, so they
    never change how an earlier word is split.

    size: of the vocabulary; where the words need fewer tokens, others that no text has fill it up.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = sorted(bytes_to_unicode().values())
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: dict[tuple[str, str], int] = {}
    for word in sorted(words, key=lambda word: (len(word), word)):
        pieces = _split(word, merges)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges[pair] = len(merges)
            vocabulary.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    vocabulary += [f"<|unused {number}|>" for number in range(size - len(vocabulary) - 2)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=list(merges),
        pad_token=pad_token,
        model_max_length=77,
    )


def _split(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """BPE: merge the best-ranked pair until none is left."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        ranked = [(merges.get(pair, len(merges)), at) for at, pair in enumerate(pairwise(pieces))]
        rank, at = min(ranked)
        if rank == len(merges):
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def text_encoders(tokenizers: Sequence[CLIPTokenizer]) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two CLIP text towers; only the second has a projection, and with it the pooled vector."""
    activations = ("quick_gelu", "gelu")
    configs = [
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            max_position_embeddings=77,
            hidden_act=activation,
            projection_dim=CONTEXT_WIDTHS[1],
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
        for tok, width, activation in zip(tokenizers, CONTEXT_WIDTHS, activations, strict=True)
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's own noise schedule, with what its config says to other schedulers, which read it too.

    `set_alpha_to_one` is false in the config on the hub, which leaves some noise after the last step of DDIM.
    """
    for_others = {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": True, "skip_prk_steps": True}
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    }
    return EulerDiscreteScheduler.from_config(config | for_others)  # type: ignore[return-value]


def untrained(words: Sequence[str], vae: str, seed: int) -> SDXL:
    """A nano with random UNet and encoders around the trained VAE of folder `vae`; the same seed, the same weights."""
    if not Path(vae, "config.json").is_file():
        raise UserError(f"model.vae={vae}: no VAE there; train one with python train.py experiment=nano_vae")
    one, two = tokenizer(words, "<|endoftext|>"), tokenizer(words, "!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser, autoencoder = unet(), AutoencoderKL.from_pretrained(vae)
        encoder, encoder_2 = text_encoders([one, two])
    return SDXL(denoiser, autoencoder, encoder, encoder_2, one, two, scheduler())


def untrained_autoencoder(seed: int) -> AutoencoderKL:
    """A random VAE; the same seed, the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return autoencoder()


def clip(
    words: Sequence[str],
    seed: int,
    size: Count = IMAGE_SIZE // 2,
    widths: Sequence[Count] = (24, 48, 96, 144),
    layers: Sequence[Count] = (1, 1, 1, 1),
) -> VisionTextDualEncoderModel:
    """A judge that scores whether an image shows what its caption describes: the text model of a CLIP, and a ResNet for
    images. Of 25,000 images a vision transformer, or a ConvNeXt, learns next to nothing, and a ResNet most subjects.

    size: of the images, in pixels. widths, layers: of each stage. Judges that differ in them err on different images.
    """
    vision = ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=list(layers),
        layer_type="basic",
        image_size=size,  # where a judge looks for it
        hidden_size=widths[-1],  # where a dual encoder does
    )
    text = _judge_text(words)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=CLIP_WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return with_flat_features(VisionTextDualEncoderModel(config))


def with_flat_features(clip: VisionTextDualEncoderModel) -> VisionTextDualEncoderModel:
    """The same model with image features of two dimensions: a ResNet of transformers has B x D x 1 x 1, which a dual
    encoder cannot project."""
    pooler = getattr(clip.vision_model, "pooler", None)
    if isinstance(pooler, torch.nn.AdaptiveAvgPool2d):
        clip.vision_model.pooler = torch.nn.Sequential(pooler, torch.nn.Flatten())
    return clip


def _judge_text(words: Sequence[str]) -> CLIPTextConfig:
    tok = tokenizer(words, "<|endoftext|>")
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=77,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
