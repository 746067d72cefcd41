"""The commands of a page of documentation, run as its reader would: in its order, in one folder, with fewer steps.

Those of the real model run on a thin SDXL: all of its tensors, an eighth of its widths (`benchmarks.synthetic`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from warm import WarmPython

from benchmarks.synthetic import Synthetic

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
ELSEWHERE = ("cd ", "git ", "make ", "pip ", "sbatch ", "scancel ", "source ", "srun ", "sudo ")
ELSEWHERE += ("tensorboard ", "torchrun ", "wandb ")
"""Starts of lines that are run by other tests: CI's own targets, tests/slurm, tests/distributed."""
APART = ("captioner=image_to_text", "--config-dir", "RUN_FOLDER", "hydra/launcher=slurm", "hydra/sweeper=search")
APART += ("to=USER",)
"""Of commands that need more than a checkout: tests/captioning, tests/slurm, tests/publish, test_extending,
test_receipt, test_sweep."""
SHORT = {
    "train.py": ["trainer.max_steps=2", "sampler.steps=2", "logger=csv"],
    "eval.py": ["sampler.steps=2", "seeds=1"],
}
FEW_SCENES = ["data.validation.num_scenes=4", "reference.num_scenes=8"]
"""Of the toy world, held out."""
FEW_DRAWN = [f"data.train.sources.{name}.num_scenes=16" for name in ("styled", "plain")]
"""Of experiment=technomant, which takes 1,200."""
THIN = ["size=128", "sampler.batch_size=1", "trainer.accumulate_grad_batches=1", "prompts=[a photo of a cat]"]
PICTURES = 13
OTHER_LORA = "other_lora.safetensors"
"""Of somebody else: that of an earlier run of the page."""


def commands(page: Path) -> list[str]:
    """Every command of the bash blocks of a page that a test of it can run."""
    lines = [line for block in BLOCKS.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    texts = [re.split(r"\s{2,}#", line)[0].strip() for line in lines]
    wanted = [text for text in texts if text and not text.startswith(("#", *ELSEWHERE))]
    return [text for text in wanted if not any(part in text for part in APART)]


def shortened(text: str, pictures: Path, thin: Synthetic, num_judged: int) -> list[str]:
    """The words after `python` of a command, with fewer steps, and with a folder and weights that exist.

    num_judged: how many more runs are judged; the others stop at the weights.
    """
    program, *words = shlex.split(text)
    assert program == "python", f"how is this run? {text}"
    words = [re.sub(r"=DIR$", f"={pictures}", word) for word in words]
    if "in=model.safetensors" in words:
        return [*words[:2], f"in={thin.weights}", f"config={thin.config}", *words[3:]]
    if "model=sdxl" in words or "size=1024" in words:
        words = [smaller(word) for word in words]
    given = {word.split("=")[0] for word in words}
    if words[:2] == ["-m", "sdft.choosing"]:
        return [*words, "strengths=[0.7,1.0]", "num_images=2", "num_others=2", "num_training=2"]
    if words[0] not in SHORT or "--cfg" in words or "reproduce" in given:
        return words
    added = list(SHORT[words[0]])
    if words[0] == "train.py":
        toy = not any(word.startswith("data=") for word in words)
        added += FEW_SCENES if toy and not teaches_subject(words) else []
        added += FEW_DRAWN if "experiment=technomant" in words else []
        added += [] if num_judged > 0 or "-m" in words else ["verdict=none"]
        added += [] if "verdict=none" in added else ["verdict.num_images=4"]
    if any(word in ("callbacks=stop_early", "callbacks=watch") for word in words):
        added += [f"callbacks.watch.measures.{name}=2" for name in ("num_images", "num_others", "num_training")]
    added += ["class_images.count=2"] if "class_images=generated" in words else []
    if "model=sdxl" in words:
        added += [*THIN, *thin.overrides[1:]] if words[0] == "train.py" else thin.overrides[1:]
    return words + [word for word in added if word.split("=")[0] not in given]


def smaller(word: str) -> str:
    """An override of the image sizes of SDXL with an eighth of them, in multiples of 32."""
    if not re.match(r"size=\d|data\.(sizes|bucket_step)=", word):
        return word
    return re.sub(r"\b(\d{2,})\b", lambda side: str(max(32, int(side[1]) // 8)), word)


def teaches_subject(words: list[str]) -> bool:
    """Whether an experiment brings its own toy scenes."""
    return any(word in ("experiment=product", "experiment=character") for word in words)


def run_page(page: Path, folder: Path, thin: Synthetic, num_judged: int = 3) -> int:
    """Run each command of a page once, in a new folder; returns how many there were."""
    for name in ("train.py", "eval.py"):
        (folder / name).symlink_to(ROOT / name)
    pictures = folder / "my_pictures"
    write_pictures(pictures)
    write_files(page, folder)
    found = commands(page)
    if any("data=preference" in text.split() for text in found):
        write_pairs(pictures)
    with WarmPython() as python:
        for text in dict.fromkeys(found):
            words = shortened(text, pictures, thin, num_judged)
            num_judged -= words[0] == "train.py"
            vote(words, folder)
            if f"tuning.start={OTHER_LORA}" in words:
                shutil.copy(next((folder / "runs").rglob("lora.safetensors")), folder / OTHER_LORA)
            status, printed = python.run(words, folder)
            assert status == 0, f"{text}\nrun as {shlex.join(words)}\n{printed[-6000:]}"
    return len(found)


def write_files(page: Path, folder: Path) -> None:
    """Write the YAML blocks of a page that say in their first line which file they are."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if match := re.match(r"# ([\w.]+\.yaml)\b", block):
            (folder / match[1]).write_text(block, encoding="utf-8")


def vote(words: list[str], folder: Path) -> None:
    """Export the votes that a command trains on as the page of its comparison does: the last subject wins each pair."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if "data.votes" not in options:
        return
    results = json.loads((folder / options["data.run"] / "results.json").read_text(encoding="utf-8"))
    first, last = (
        [each for each in results["pictures"] if each["subject"] == subject["name"]]
        for subject in (results["subjects"][0], results["subjects"][-1])
    )
    votes = [
        {"axes": left["axes"], "left": left, "right": right, "choice": "right"}
        for left, right in zip(first, last, strict=True)
    ]
    (folder / options["data.votes"]).write_text(json.dumps({"votes": votes}), encoding="utf-8")


def write_pairs(folder: Path) -> None:
    """Judge the pictures of a folder two by two."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")
    pairs = zip(names[::2], names[1::2], strict=False)
    rows = [{"chosen": chosen, "rejected": rejected, "caption": "a cat"} for chosen, rejected in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_pictures(folder: Path, side: int = 160) -> None:
    """Photographs with captions, larger than the images that are trained on; the first one is partly transparent."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        picture = Image.fromarray(pixels).resize((side, side))
        if number:
            picture.save(folder / f"{number:02}.jpg")
        else:
            picture.putalpha(Image.linear_gradient("L").resize((side, side)))
            picture.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a cat on a table {number}", encoding="utf-8")
