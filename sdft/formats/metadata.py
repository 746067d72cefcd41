"""safetensors metadata of models and LoRAs: ModelSpec (`modelspec.*`), and `ss_*` for LoRA tools.

Key names: https://github.com/Stability-AI/ModelSpec. Values are strings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from sdft.formats.safetensors_io import HASH_KEY

ARCHITECTURE = "stable-diffusion-xl-v1-base"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
BASE_MODEL_VERSION = "sdxl_base_v1-0"
PREDICTION_TYPE = "modelspec.prediction_type"
PREDICTION_NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
"""What a model predicts -> its name in ModelSpec, which defines the first two."""
ZERO_TERMINAL_SNR = "ss_zero_terminal_snr"
"""kohya's key; without it, images of such a LoRA come out grey."""


def model_metadata(
    title: str, prediction: str = "epsilon", size_hw: tuple[int, int] = (1024, 1024), words: Iterable[str] = ()
) -> dict[str, str]:
    """Metadata of a model; the writer fills in the hash.

    prediction: a key of `PREDICTION_NAMES`. words: trigger words for prompts.
    """
    h, w = size_hw
    phrase = {"modelspec.trigger_phrase": ", ".join(words)} if words else {}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.resolution": f"{w}x{h}",
        "modelspec.date": date(),
        PREDICTION_TYPE: PREDICTION_NAMES[prediction],
        HASH_KEY: "",
        **phrase,
    }


def lora_metadata(
    title: str,
    prediction: str = "epsilon",
    size_hw: tuple[int, int] = (1024, 1024),
    words: Iterable[str] = (),
    zero_terminal_snr: bool = False,
) -> dict[str, str]:
    """Metadata of a LoRA file, without rank and alpha (`lora_layer.network_metadata`)."""
    general = model_metadata(title, prediction, size_hw, words)
    v = {"ss_v2": "False", "ss_v_parameterization": "True"} if prediction == "v_prediction" else {}
    v |= {ZERO_TERMINAL_SNR: "True"} if zero_terminal_snr else {}
    return {
        **general,
        "modelspec.architecture": f"{ARCHITECTURE}/lora",
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_output_name": title,
        "ss_resolution": f"({size_hw[1]}, {size_hw[0]})",
        **v,
    }


def stated_prediction(metadata: Mapping[str, str]) -> str | None:
    """The prediction type that a file's metadata states, a key of `PREDICTION_NAMES`; None if it states none."""
    stated = metadata.get(PREDICTION_TYPE, "").lower()
    if stated in ("v", "v_prediction", "v-prediction") or metadata.get("ss_v_parameterization") == "True":
        return "v_prediction"
    return next((prediction for prediction, name in PREDICTION_NAMES.items() if stated == name), None)


def says_zero_terminal_snr(metadata: Mapping[str, str]) -> bool:
    """Whether a LoRA's metadata says that it was trained with zero terminal SNR, by kohya's key."""
    return metadata.get(ZERO_TERMINAL_SNR) == "True"


def date() -> str:
    """The current time, or SOURCE_DATE_EPOCH if that is set: with it, equal runs write equal bytes."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
