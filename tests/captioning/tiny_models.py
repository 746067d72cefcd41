"""Image-to-text models and a tagger with random weights, in the files of the real ones."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ["a", "cat", "dog", "red", "picture", "of", "Describe", "this", "image", "in", "one", "sentence.", "What",
         "does", "the", "describe?", "detail"]  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "initializer_range": 1.0}  # fmt: skip
"""Large random weights, so that captions depend on the image."""


def blip(folder: Path) -> Path:
    """An encoder and a decoder, with BERT's tokenizer."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    vocabulary = folder.with_suffix(".txt")
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]) + "\n")
    tokenizer = BertTokenizer(vocab=str(vocabulary), additional_special_tokens=["[DEC]"])
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 64, **ids, **SMALL}
    vision = {"image_size": 32, "patch_size": 16, **SMALL}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def words_tokenizer(**special: Any) -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **ids, **special)


def llava(folder: Path) -> Path:
    """A chat model: its answer comes behind the question."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = words_tokenizer(additional_special_tokens=["<image>"])
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=16, **SMALL | {"num_hidden_layers": 2})
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **ids, **SMALL)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, chat_template=template, **options).save_pretrained(folder)
    return folder


def florence(folder: Path) -> Path:
    """A model with tasks; its processor takes the answer out of the text."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = words_tokenizer(extra_special_tokens={"image_token": "<image>"})
    ones = {"depths": [1] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4, "embed_dim": [8, 8, 8, 16]}
    vision = {
        **ones,
        "window_size": 2,
        "projection_dim": 16,
        "max_position_embeddings": 50,
        "max_temporal_embeddings": 4,
    }
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder")
              for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "max_position_embeddings": 64,
            "init_std": 1.0, **layers, **ids}  # fmt: skip
    torch.manual_seed(0)
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=4)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, image_seq_length=5)
    tasks = {"pure_text": {}}
    Florence2Processor(images, tokenizer, num_additional_image_tokens=1, post_processor_config=tasks).save_pretrained(
        folder
    )
    return folder


TAGS = [
    ("general", 9),
    ("sensitive", 9),
    ("red", 0),
    ("green", 0),
    ("long_blue_hair", 0),
    ("^_^", 0),
    ("saber_(fate)", 4),
]


def tagger(folder: Path, side: int = 8) -> Path:
    """The probability of red, green and blue is the mean of that channel, that of the character the mean of all; of the
    rest it is one half."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    weights = np.zeros((3, len(TAGS)), np.float32)
    weights[2, 2] = weights[1, 3] = weights[0, 4] = 1 / 255  # channels are B, G, R
    weights[:, 6] = 1 / 765
    bias = np.array([0.5, 0.5, 0, 0, 0, 0.5, 0], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["tags"]),
    ]
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in (("weights", weights), ("bias", bias), ("axes", np.array([1, 2])))
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", side, side, 3])
    found = helper.make_tensor_value_info("tags", TensorProto.FLOAT, ["N", len(TAGS)])
    graph = helper.make_graph(nodes, "tagger", [pixels], [found], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([number, name, category, 1] for number, (name, category) in enumerate(TAGS))
    return folder
