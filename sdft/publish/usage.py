"""How to use published weights: in Python, ComfyUI, A1111 and Forge."""

from __future__ import annotations

import json

from sdft.publish.facts import Facts
from sdft.training.callbacks.export import file_name

LORA, EMBEDDINGS = "pytorch_lora_weights.safetensors", "embeddings"
"""The name that diffusers looks for in a repository, and the folder of new words."""
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def python(facts: Facts, title: str, to: str | None) -> str:
    """A block of Python that draws an image. to: the repository; a placeholder if None."""
    repository = to or "USER/NAME"
    lines = nano_lines(facts, title, repository) if facts.is_nano else diffusers_lines(facts, title, repository)
    return "```python\n" + "\n".join(lines) + "\n```"


def diffusers_lines(facts: Facts, title: str, repository: str) -> list[str]:
    """With diffusers."""
    source = repository if facts.kind == "model" else facts.base or SDXL
    lines = ["import torch", "from diffusers import StableDiffusionXLPipeline"]
    lines += ["from diffusers import EulerDiscreteScheduler"] if facts.predicts_v and facts.kind != "model" else []
    if facts.words is not None:
        lines += ["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file"]
    one_file = facts.kind != "model" and facts.base is None
    if one_file:
        opened = f'StableDiffusionXLPipeline.from_single_file("{facts.base_name}", torch_dtype=torch.float16)'
    else:
        opened = f'StableDiffusionXLPipeline.from_pretrained("{source}", torch_dtype=torch.float16)'
    lines += ["", f'pipeline = {opened}.to("cuda")']
    if facts.predicts_v and facts.kind != "model":
        zero = bool(facts.value("objective.zero_terminal_snr"))
        lines += [
            "pipeline.scheduler = EulerDiscreteScheduler.from_config(",
            f'    pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr={zero}',
            ")",
        ]
    if facts.kind == "adapter":
        lines += lora_lines(facts, title, repository)
    if facts.words is not None:
        for word in facts.words.vectors:
            lines += word_lines(word, repository)
    prompt = json.dumps(facts.example, ensure_ascii=False)
    steps, cfg = facts.value("sampler.steps") or 25, facts.value("sampler.cfg") or 5.0
    lines += [
        f"image = pipeline({prompt}, num_inference_steps={steps}, guidance_scale={cfg}).images[0]",
        'image.save("image.png")',
    ]
    return lines


def lora_lines(facts: Facts, title: str, repository: str) -> list[str]:
    if "lora" not in facts.artifacts:
        return [f"# diffusers cannot load a {facts.method}; use {title}.safetensors in ComfyUI"]
    return [f'pipeline.load_lora_weights("{repository}", weight_name="{LORA}")']


def word_lines(word: str, repository: str) -> list[str]:
    """A new word: its embedding for each text encoder."""
    return [
        f'rows = load_file(hf_hub_download("{repository}", "{EMBEDDINGS}/{file_name(word)}.safetensors"))',
        f'encoders = {{"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}}',  # noqa: F541
        "for name, (encoder, tokenizer) in encoders.items():",
        "    pipeline.load_textual_inversion(",
        f"        rows[name], token={json.dumps(word, ensure_ascii=False)}, text_encoder=getattr(pipeline, encoder), "
        "tokenizer=getattr(pipeline, tokenizer)",
        "    )",
    ]


def nano_lines(facts: Facts, title: str, repository: str) -> list[str]:
    """With sdft: nano is not on the Hub."""
    lines = [
        "import sdft",
        "from huggingface_hub import snapshot_download",
        "",
        f'folder = snapshot_download("{repository}")',
    ]
    if facts.kind == "model":
        lines.append("model = sdft.load_model(folder)")
    else:
        lora = f'lora=f"{{folder}}/{title}.safetensors"' if facts.kind == "adapter" else ""
        words = 'words=f"{folder}/words.safetensors"' if facts.words is not None else ""
        lines.append(f'model = sdft.load_model("nano", {", ".join(part for part in (lora, words) if part)})')
    size = facts.value("size") or 128
    prompt = json.dumps(facts.example, ensure_ascii=False)
    return [*lines, f'sdft.sample(model, [{prompt}], size={size})[0].save("image.png")']


def programs(facts: Facts, title: str) -> str:
    """ComfyUI, A1111 and Forge."""
    lines = []
    if facts.is_nano:
        return ""
    if facts.kind == "adapter":
        lines.append(
            f"**ComfyUI**: put `{title}.safetensors` into `models/loras` and add the node *Load LoRA*, strength 1. "
            f"**A1111, Forge**: put it into `models/Lora` and write `<lora:{title}:1>` into the prompt."
        )
    if facts.words is not None:
        names = [file_name(word) for word in facts.words.vectors]
        lines.append(
            f"**The new words**: put the files of `{EMBEDDINGS}/` into ComfyUI's `models/embeddings`, and write "
            f"`embedding:{names[0]}` in place of the word; in A1111 and Forge into `embeddings`, and write "
            f"`{names[0]}`."
        )
    if facts.kind == "model":
        single = "single_file" in facts.artifacts
        file = (
            f"`{title}.safetensors`"
            if single
            else "one file, made of the folder by `python -m sdft.formats to=single_file`,"
        )
        lines.append(f"**ComfyUI, A1111, Forge**: {file} goes into `models/checkpoints` (`models/Stable-diffusion`).")
    if facts.predicts_v:
        lines.append("In ComfyUI, add the node *ModelSamplingDiscrete* with `v_prediction` behind the model.")
    return "\n\n".join(lines)
