"""receipt.json: the inputs and outputs of a run, so that it can be reproduced and compared.

Inputs are the config and hashes of code, package versions, machine, data and base weights; outputs are hashes of the
written weights, and the metrics.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from sdft.data.cache import digest
from sdft.errors import UserError
from sdft.formats.json_file import read_json
from sdft.formats.run_folder import RECEIPT
from sdft.formats.safetensors_io import read_header
from sdft.progress import ENOUGH_FOR_A_BAR, tqdm

NAME = RECEIPT
PACKAGES = ("accelerate", "diffusers", "hydra-core", "lightning", "numpy", "peft", "pillow", "safetensors", "torch",
            "transformers")  # fmt: skip
MADE_FROM = ("config", "git", "versions", "hardware", "threads", "data", "base_weights", "starts_from")
"""Entries that can make two runs differ."""
STARTS_FROM = ("merged", "baked")
"""Attributes of a model that say from which files its weights were made."""
KINDS: dict[str, Any] = {
    "config": dict,
    "git": dict,
    "versions": dict,
    "hardware": dict,
    "threads": int,
    "data": str,
    "base_weights": str | list | dict | None,
    "outputs": dict,
    "figures": dict,
}
"""Entries of the receipt of a finished run, and what they are."""
OF_THE_RUN = ("run_dir", "dry_run", "reproduce", "trust")
"""Config keys without influence on the result."""


def begun(
    config: Mapping[str, Any],
    overrides: Sequence[str] | None,
    model: nn.Module,
    base_weights: str,
    data: Any,
    num_devices: int,
) -> dict:
    """The receipt of a run that is about to start. Hashes all images.

    base_weights: the fingerprint of the model before tuning changed it.
    """
    captions = CaptionCount()
    digest_of_data = data_digest(data, captions)
    return {
        "config": dict(config),
        "overrides": None if overrides is None else list(overrides),  # None: only the config is known
        "git": git_state(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": hardware(num_devices),
        "threads": torch.get_num_threads(),
        "seed": config["seed"],
        "data": digest_of_data,
        "images": data_summary(data, captions),
        "base_weights": base_weights,
        "starts_from": {name: found for name in STARTS_FROM if (found := getattr(model, name, None))},
    }


def finished(receipt: dict, artifacts: Mapping[str, Path], summary: Mapping[str, Any]) -> dict:
    """The receipt with its outputs: a hash of each file of weights, and the metrics except times."""
    weights = {name: path for name, path in artifacts.items() if path.is_dir() or path.suffix == ".safetensors"}
    metrics = {k: v for k, v in summary.items() if isinstance(v, int | float) and not k.endswith("seconds")}
    return {**receipt, "outputs": {name: weights_digest(path) for name, path in weights.items()}, "figures": metrics}


def read(path: str | Path) -> dict:
    """Read a receipt. Raises UserError if there is none, or if its run did not finish."""
    receipt = _read(path)
    wrong = [key for key, kind in KINDS.items() if not isinstance(receipt.get(key), kind)]
    if wrong or not isinstance(receipt["config"].get("run_dir"), str) or not 1 <= receipt["threads"] <= 1024:
        what = f"{', '.join(wrong) or 'config.run_dir or threads'} is missing, or of another kind"
        raise UserError(f"reproduce={path}: is no receipt of sdft ({what}); pass the {NAME} of a run")
    return receipt


def _read(path: str | Path) -> dict:
    """A receipt of which only the overrides are known to be what they must be."""
    file = Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"reproduce={path}: there is no such file; pass the {NAME} of a run")
    receipt = read_json(file, f"reproduce={path}")
    words = receipt.get("overrides")
    if not isinstance(words, list | None) or not all(isinstance(word, str) for word in words or ()):
        raise UserError(f"reproduce={path}: is no receipt of sdft (its overrides are no list of texts)")
    if "outputs" not in receipt:
        raise UserError(f"reproduce={path}: this run did not finish, so there is nothing to compare with")
    return receipt


def file_in(words: Sequence[str]) -> Path | None:
    """The receipt that `reproduce=` of a command names."""
    for word in words:
        if word.startswith("reproduce=") and (path := word.partition("=")[2]) not in ("", "null"):
            file = Path(path).expanduser()
            return file / NAME if file.is_dir() else file
    return None


def recalled(words: Sequence[str]) -> list[str]:
    """The overrides of a command; with `reproduce=RECEIPT`, those of the receipt's run come first."""
    for word in words:
        if word.startswith("reproduce=") and (path := word.partition("=")[2]) not in ("", "null"):
            recorded = _read(path).get("overrides")
            if recorded is None:
                raise UserError(
                    f"reproduce={path}: this run was started from Python with a config and no overrides; repeat it "
                    f"there, sdft.finetune(['reproduce={path}'])"
                )
            return [*(word for word in recorded if word.partition("=")[0] not in OF_THE_RUN), *words]
    return list(words)


def compared(old: dict, new: dict) -> str:
    """A message that begins with `identical`. Raises UserError with all differences if the weights differ."""
    before, now = ({k: ({"starts_from": {}} | run)[k] for k in MADE_FROM} for run in (old, new))  # not in earlier ones
    causes = "; ".join(differences(before, now))
    metrics = "; ".join(differences(old["figures"], new["figures"]))
    if old["outputs"] != new["outputs"]:
        names = sorted(k for k in {*old["outputs"], *new["outputs"]} if old["outputs"].get(k) != new["outputs"].get(k))
        raise UserError(
            f"reproduce: the weights of {', '.join(names)} differ from the receipt; the inputs of the runs "
            + (f"differ: {causes}" if causes else "are the same, so something in this run is not deterministic")
        )
    message = f"identical: {', '.join(sorted(old['outputs']))}, every weight"
    message += f"; but metrics differ: {metrics}" if metrics else "; and every metric"
    return message + (f"\n  although inputs differ: {causes}" if causes else "")


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """`key: old -> new` for every value that differs."""
    if not path and "config" in old:
        old, new = ({**r, "config": portable(r["config"])} for r in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {old} -> {new}"


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without paths of its run."""
    text = json.dumps({k: v for k, v in config.items() if k not in OF_THE_RUN})
    return json.loads(text.replace(json.dumps(config["run_dir"])[1:-1], "RUN_DIR"))


def git_state() -> dict[str, Any]:
    """The commit of the code, and a hash of uncommitted changes; empty if the code is not a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    if not (root / "train.py").is_file():  # an installed package, perhaps below somebody else's repository
        return {}
    try:
        changed = git("status", "--porcelain")
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(changed),
            "diff": digest([changed, git("diff", "HEAD")]) if changed else None,
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def hardware(num_devices: int) -> dict[str, Any]:
    """Processor and GPUs: rounding differs between them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "num_processors": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_devices": num_devices,
    }


class CaptionCount:
    """How many different captions there are, and how many words they have."""

    def __init__(self) -> None:
        self.different: set[int] = set()
        self.words: Counter[int] = Counter()

    def add(self, caption: str) -> None:
        self.different.add(xxhash.xxh3_64_intdigest(caption.encode(errors="surrogatepass")))
        self.words[len(caption.split())] += 1


def data_summary(data: Any, captions: CaptionCount) -> dict[str, Any]:
    """Numbers of images, their training sizes, and captions; no names and no texts. captions: of all images."""
    sizes = {f"{w}x{h}": len(items) for (h, w), items in data.train_set.by_size().items()}
    words = sorted(captions.words.elements())
    return {
        "training": len(data.train_set.source.keys),
        "held_out": len(data.validation_set.source.keys),
        "sizes": sizes,
        "different_captions": len(captions.different),
        "words_per_caption": words[len(words) // 2] if words else 0,
    }


def data_digest(data: Any, captions: CaptionCount | None = None) -> str:
    """SHA-256 of all keys, captions and images: stored images by their bytes, generated ones by their pixels.

    captions: counts the captions on the way.
    """
    found = hashlib.sha256()
    for dataset, scan in data.parts():
        keys = dataset.source.keys
        few = len(keys) < ENOUGH_FOR_A_BAR
        for index, key in enumerate(tqdm(keys, "hashing", unit="image", disable=few, leave=False)):
            sample = dataset.source[index]
            every = sample.captions.every if sample.captions else None
            if captions is not None:
                captions.add(sample.caption)
            content = scan.digest(index) or hashlib.sha256(sample.image_HWC.tobytes()).hexdigest()
            found.update(json.dumps([key, content, every or sample.caption, sample.loss_weight]).encode())
    return found.hexdigest()


def weights_digest(path: Path) -> str:
    """SHA-256 of the tensors of a safetensors file, or of all in a folder; metadata such as dates is left out."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        stored, _ = read_header(str(path), file)
        found.update(json.dumps([[entry.name, entry.dtype, entry.shape] for entry in stored]).encode())
        with file.open("rb") as opened:
            opened.seek(8 + int.from_bytes(opened.read(8), "little"))
            hashlib.file_digest(opened, lambda: found)  # type: ignore[arg-type, return-value]
    return found.hexdigest()
