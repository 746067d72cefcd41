"""Captions by any image-to-text model of transformers: BLIP, BLIP-2, Florence-2, LLaVA, Qwen-VL and others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdft.errors import UserError
from sdft.types import DTYPES, BatchSize, Count, Precision


class ImageToText:
    """A model that transformers loads as `AutoModelForImageTextToText`, with its processor.

    model: folder or hub id. prompt: what the model is asked: a beginning of the caption (BLIP), a task (Florence-2:
    `<MORE_DETAILED_CAPTION>`), or an instruction (chat models, through their chat template); none if empty.
    max_new_tokens: of a caption. num_beams: 1 for greedy search. dtype: of the weights.

    Captions are the same at every run: nothing is sampled. Raises UserError if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        prompt: str = "",
        max_new_tokens: Count = 75,
        num_beams: Count = 1,
        batch_size: BatchSize = 8,
        dtype: Precision = "fp32",
        revision: str | None = None,
    ):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = os.path.expanduser(model)
        self.prompt, self.batch_size = prompt, batch_size
        self.options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model, revision=revision)
            loaded = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=DTYPES[dtype], use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"captioner.model={model}: no image-to-text model can be loaded "
                f"({' '.join(str(error).split())[:500]}); "
                "give a folder or a hub id of one in safetensors, such as Salesforce/blip-image-captioning-large"
            ) from error
        self.model: Any = loaded.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        pictures = [Image.fromarray(image) for image in images]
        inputs = self._inputs(pictures)
        tensors = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        ids_BL = self.model.generate(**tensors, **self.options)
        if not self.model.config.is_encoder_decoder and "input_ids" in tensors and self._repeats(tensors, ids_BL):
            ids_BL = ids_BL[:, tensors["input_ids"].shape[1] :]
        if hasattr(self.processor, "post_process_generation"):
            texts = self.processor.batch_decode(ids_BL, skip_special_tokens=False)
            return [self._task_answer(text, picture) for text, picture in zip(texts, pictures, strict=True)]
        texts = self.processor.batch_decode(ids_BL, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        if getattr(self.processor, "chat_template", None):
            ask = self.prompt or "Describe this image in one sentence."
            talks = [
                [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": ask}]}]
                for picture in pictures
            ]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return self.processor.apply_chat_template(
                talks, return_tensors="pt", processor_kwargs={"padding": True}, **options
            )
        if self.prompt:
            texts = [self.prompt] * len(pictures)
            return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return self.processor(images=pictures, return_tensors="pt")

    def _repeats(self, tensors: dict[str, torch.Tensor], ids_BL: torch.Tensor) -> bool:
        """Whether the answer begins with the question, as that of a chat model does."""
        asked = tensors["input_ids"]
        chat = bool(getattr(self.processor, "chat_template", None))
        return chat and ids_BL.shape[1] > asked.shape[1] and torch.equal(ids_BL[:, : asked.shape[1]], asked)

    def _task_answer(self, text: str, picture: Image.Image) -> str:
        """The caption in the answer of Florence-2."""
        found = self.processor.post_process_generation(text, task=self.prompt, image_size=picture.size)
        answer = found.get(self.prompt, "") if isinstance(found, dict) else found
        return " ".join(str(answer).replace("<pad>", "").split())
