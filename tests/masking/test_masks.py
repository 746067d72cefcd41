"""Masks: made, found beside images and in shards, cropped with them, and weighting the loss."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sdft.data import __main__ as commands
from sdft.data.datamodule import Images
from sdft.data.decode import decode_mask
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Mix, Shards
from sdft.errors import UserError
from sdft.masking.segmenters import ClassSegmenter, PlainBackground, TextSegmenter
from sdft.objective.denoising import Denoising, masked_mean
from sdft.rng import Draws


def product(size: tuple[int, int] = (80, 60)) -> tuple[Image.Image, np.ndarray]:
    """A ring before a grey wall that gets a little brighter, and where the ring is, its hole included."""
    w, h = size
    wall = np.tile(np.linspace(190, 205, w, dtype=np.uint8)[None, :, None], (h, 1, 3))
    picture = Image.fromarray(wall)
    box = (w // 4, h // 5, 3 * w // 4, 4 * h // 5)
    ImageDraw.Draw(picture).ellipse(box, outline=(180, 30, 40), width=6)
    truth = Image.new("L", size)
    ImageDraw.Draw(truth).ellipse(box, fill=255)
    return picture, np.asarray(truth)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        picture, _ = product((80 + 8 * i, 60))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"ring {i}")
    return folder


def run(command: str, capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [command, *words])
    commands.COMMANDS[command]()
    return capsys.readouterr().out


class TestCommand:
    def test_masks_are_made_beside_the_images(self, root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        told = run("mask", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out")
        assert "4 images, 4 to mask" in told
        assert Image.open(tmp_path / "out" / "masks.png").width > 200
        for i in range(4):
            truth = product((80 + 8 * i, 60))[1]
            assert np.array_equal(np.asarray(Image.open(root / f"{i}.mask.png")), truth)
        assert len(Folder(str(root), "all").keys) == 4, "masks are no images"
        assert Folder(str(root), "all").left_out == []

    def test_masks_made_by_hand_stay(self, root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        own = Image.new("L", (80, 60), 7)
        own.save(root / "0.mask.png")
        own.save(root / "1-masklabel.png")
        assert "4 images, 2 to mask" in run("mask", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out")
        assert np.asarray(Image.open(root / "0.mask.png")).max() == 7

    def test_nothing_found_is_named(self, root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        Image.new("RGB", (64, 64), "white").save(root / "0.png")
        told = run("mask", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out")
        assert "nothing or everything was found in: 0.png (0.0% of it)" in told


    def test_images_that_share_a_name_have_their_own(self, root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        """A mask by hand, which is that of both, is not replaced."""
        product((90, 70))[0].save(root / "0.jpg")
        Image.new("L", (80, 60), 7).save(root / "1.mask.png")
        words = [f"root={root}", f"out={tmp_path}/out"]
        assert "5 images, 4 to mask" in run("mask", capsys, monkeypatch, *words)
        assert {file.name for file in root.glob("0*.mask.png")} == {"0.jpg.mask.png", "0.png.mask.png"}
        assert "5 images, 0 to mask" in run("mask", capsys, monkeypatch, *words)
        source = Folder(str(root), "all")
        assert {key: source.mask(i).mask().shape for i, key in enumerate(source.keys)}["0.jpg"] == (70, 90)
        Image.new("L", (90, 70), 9).save(root / "2.mask.png")
        product((90, 70))[0].save(root / "2.jpg")
        run("mask", capsys, monkeypatch, *words)
        assert np.asarray(Image.open(root / "2.mask.png")).max() == 9


class TestSegmenters:
    def test_a_plain_background(self) -> None:
        picture, truth = product()
        assert np.array_equal(PlainBackground()(np.asarray(picture)), truth)
        assert PlainBackground(tolerance=5)(np.asarray(picture)).mean() > truth.mean()

    def test_clipseg(self, tmp_path: Path) -> None:
        """A small model with random weights, in the files of the real one."""
        from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, CLIPTokenizer
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        from sdft.models.nano import WEIGHTS as NANO

        tokenizer = CLIPTokenizer.from_pretrained(NANO / "clip")
        layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
        config = CLIPSegConfig(
            text_config={**layers, **text}, vision_config={**layers, "image_size": 32, "patch_size": 16},
            projection_dim=16, reduce_dim=8, extract_layers=[0, 1], decoder_num_attention_heads=2,
            decoder_intermediate_size=8,
        )  # fmt: skip
        torch.manual_seed(0)
        CLIPSegForImageSegmentation(config).save_pretrained(tmp_path)
        CLIPSegProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
        image = np.asarray(product()[0])
        soft = TextSegmenter("a cat", str(tmp_path), threshold=None)(image)
        assert soft.shape == (60, 80)
        assert soft.dtype == np.uint8
        hard = TextSegmenter("a cat", str(tmp_path), threshold=float(np.median(soft)) / 255)(image)
        assert set(np.unique(hard)) <= {0, 255}
        with pytest.raises(UserError, match=r"segmenter\.model=.*: no CLIPSeg model can be loaded"):
            TextSegmenter("a cat", str(tmp_path / "gone"))

    def test_classes(self, tmp_path: Path) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
        from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

        names = {0: "background", 1: "cat", 2: "dog"}
        config = SegformerConfig(
            hidden_sizes=[4, 4, 4, 4], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
            id2label=names, label2id={name: number for number, name in names.items()},
        )  # fmt: skip
        torch.manual_seed(0)
        SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
        SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
        image = np.asarray(product()[0])
        parts = [ClassSegmenter(str(tmp_path), [name]).chosen for name in ("cat", "Dog")]
        assert parts == [[1], [2]]
        assert ClassSegmenter(str(tmp_path)).chosen == [1, 2]
        assert ClassSegmenter(str(tmp_path), ["background", "cat", "dog"])(image).min() == 255
        with pytest.raises(UserError, match=r"segmenter\.classes: 'cow' is none of the model's: background, cat, dog"):
            ClassSegmenter(str(tmp_path), ["cow"])


class TestData:
    def with_masks(self, root: Path) -> Path:
        for i in range(3):
            image = Image.open(root / f"{i}.png").convert("L")
            image.save(root / f"{i}.mask.png")  # a mask that shows where each pixel goes
        return root

    def test_a_mask_is_cropped_with_its_image(self, root: Path) -> None:
        source = Folder(str(self.with_masks(root)), "all")
        options = {"crop": "random", "flip": True, "bucket_step": 16, "masks": True, "cache": "off"}
        data = Images(source, source, 2, 64, **options)
        assert data.num_masked == 3
        for i in range(3):
            for visit in range(4):
                example = data.train_set[i, visit]
                grey = (example["pixels_BCHW"] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
                assert example["mask_B1HW"].shape == (1, *grey.shape)
                assert ((grey + 1) / 2 - example["mask_B1HW"][0]).abs().mean() < 0.02
        assert data.train_set[3, 0]["mask_B1HW"].min() == 1, "an image without a mask counts whole"
        assert "mask_B1HW" not in data.validation_set[0, 0]

    def test_masks_go_through_shards_and_mixes(self, root: Path, tmp_path: Path) -> None:
        folder = Folder(str(self.with_masks(root)), "all")
        (shard,) = write_shards(folder, tmp_path / "out", 10)
        for source in (Shards(str(shard), "all"), Mix({"a": folder})):
            masks = [source.mask(i) for i in range(4)]
            assert [mask.content() if mask else None for mask in masks] == [
                (root / f"{i}.mask.png").read_bytes() if i < 3 else None for i in range(4)
            ]

    def test_transparency_is_a_mask(self) -> None:
        picture = Image.new("RGBA", (10, 8), (255, 255, 255, 0))
        picture.paste((0, 0, 0, 200), (2, 2, 6, 6))
        content = io.BytesIO()
        picture.save(content, "PNG")
        found = decode_mask(content.getvalue())
        assert (found[3, 3], found[0, 0], found.shape) == (200, 0, (8, 10))

    @pytest.mark.parametrize(
        ("spoil", "complaint"),
        [
            (
                lambda r: Image.new("L", (10, 10)).save(r / "1.mask.png"),
                r"1\.mask\.png \(10 x 10, and its image 88 x 60\)",
            ),
            (lambda r: (r / "1.mask.png").write_bytes(b"x"), r"1\.mask\.png \(not a known image format\)"),
            (lambda r: [f.unlink() for f in r.glob("*.mask.png")], "no image has a mask; cat.mask.png is that of"),
        ],
    )
    def test_masks_that_do_not_fit_are_told(self, spoil, complaint: str, root: Path) -> None:
        spoil(self.with_masks(root))
        source = Folder(str(root), "all")
        Images(source, source, 2, 64)
        with pytest.raises(UserError, match=rf"data\.masks.*{complaint}"):
            Images(source, source, 2, 64, masks=True)

    def test_a_mask_without_an_image_is_left_out(self, root: Path) -> None:
        Image.new("L", (10, 10)).save(root / "gone.mask.png")
        source = Folder(str(root), "all")
        assert "gone.mask.png" not in set(source.keys)
        assert source.left_out == ["1 x a mask without its image"]


class TestLoss:
    def test_by_hand(self) -> None:
        """Of four latents with the errors 1, 2, 3, 4: one inside, one half inside; with 0.1 outside
        (1 + 0.55 * 2 + 0.1 * 3 + 0.1 * 4) / 1.75."""
        error = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8, :8], mask[..., :8, 8:12] = 1, 1
        assert masked_mean(error, mask, 0.0).item() == pytest.approx((1 + 0.5 * 2) / 1.5)
        assert masked_mean(error, mask, 0.1).item() == pytest.approx((1 + 0.55 * 2 + 0.3 + 0.4) / 1.75)
        assert masked_mean(error, mask, 1.0).item() == pytest.approx(2.5)
        assert masked_mean(error, torch.zeros(1, 1, 16, 16), 0.0).item() == 0

    def test_outside_of_the_mask_nothing_is_learned(self, tiny_model, tiny_batch) -> None:
        """The gradient of the prediction is zero there, and with a mask of ones the loss is the usual one."""
        model, batch = tiny_model(), tiny_batch(2)
        draws = Draws(0, batch.keys, batch.visits)
        plain = Denoising()(model, batch, draws).per_sample_B
        batch.mask_B1HW = torch.ones(2, 1, *batch.pixels_BCHW.shape[2:])
        torch.testing.assert_close(Denoising()(model, batch, draws).per_sample_B, plain)
        batch.mask_B1HW[..., :, : batch.pixels_BCHW.shape[3] // 2] = 0
        kept = []
        denoise = model.denoise

        def keep(*given):
            kept.append(denoise(*given))
            kept[-1].retain_grad()
            return kept[-1]

        model.denoise = keep
        Denoising()(model, batch, draws).per_sample_B.sum().backward()
        gradient = kept[0].grad
        half = gradient.shape[3] // 2
        assert gradient[..., :half].abs().max() == 0
        assert gradient[..., half:].abs().min() > 0
