"""Commands as people mistype them, with files as strangers damage them: each must be done, or refused in a few lines.

    PYTHONPATH=tests python tests/robustness/tries.py [--kind KIND] [--only WORDS]

Prints a table kind x tries x held, and what did not hold. Each try runs in a process of its own. It holds if it ends
within its time, with exit code 0 or 2 (and the one that it must have), at most 25 lines of error without a traceback,
the words that its message must have, and if no attack left its mark.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save, save_file
from warm import WarmPython

from robustness.readers import LAYER, LORAS, TARS

ROOT = Path(__file__).resolve().parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "run_of_version_0_1"
SECONDS = 90
MAX_LINES = 25
"""Lists of weights that do not fit have one line each."""
MARK = "the_attack_ran"
TRAIN, EVAL = [str(ROOT / "train.py")], [str(ROOT / "eval.py")]
MERGE, FORMATS = ["-m", "sdft.merging"], ["-m", "sdft.formats"]
SHORT = ["trainer.max_steps=1", "verdict=none", "~callbacks.previews", "logger=csv", "run_dir=run"]
SHORT += ["trainer.progress_bar=false", "data.train.num_scenes=4", "data.validation.num_scenes=2"]
ONE_IMAGE = ["prompts=[cat]", "seeds=1", "sampler.steps=1", "run_dir=compared", "size=32"]


@dataclass(frozen=True)
class Try:
    """One command, and what must come of it."""

    kind: str
    name: str
    words: Sequence[str]
    prepare: Callable[[Path], Any] = lambda folder: None
    """Makes the files in the folder in which the command is called."""
    code: int | None = 2
    """The exit code; None if the command may be done as well as refused."""
    says: str = ""
    """What the message has in it."""
    environment: dict[str, str] = field(default_factory=dict)


def outcome(one: Try, python: WarmPython) -> str:
    """What did not hold; empty if all did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one.prepare(folder)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", **one.environment}
        command = ["timeout", "-s", "KILL", str(SECONDS), python.executable, *one.words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
        errors = done.stderr.split("\r")[-1]
        lines = [line for line in errors.splitlines() if line.strip()]
        if done.returncode in (-9, 137):
            return f"took more than {SECONDS} s"
        if any(folder.rglob(MARK)) or (ROOT / MARK).exists():
            return "the attack ran"
        if "Traceback" in done.stdout + done.stderr:
            return f"a traceback: {lines[-1][:200]}"
        if done.returncode not in (0, 2) or (one.code is not None and done.returncode != one.code):
            return f"exit code {done.returncode}: {' | '.join(lines[-3:])[:300]}"
        if done.returncode == 2 and not any(line.startswith("error") for line in lines):
            return f"no line with the error: {' | '.join(lines[-3:])[:200]}"
        if len(lines) > MAX_LINES:
            return f"{len(lines)} lines of error: {lines[-1][:100]}"
        return "" if one.says in done.stderr + done.stdout else f"does not say {one.says!r}: {' | '.join(lines)[:300]}"


VALUES = [
    "0",
    "-1",
    "-0.5",
    "1.5",
    "1e400",
    "nan",
    "-inf",
    "99999999999999999999",
    "1e-400",
    "text",
    "''",
    "[]",
    "{}",
    "true",
    "null",
    "0x10",
    "[1,2]",
    "\u0663",
    "1e9",
    "100000000",
]


def options() -> Iterator[Try]:
    """Every number and switch of train.py's config with values that mean nothing there; a dry run shows the rest."""
    from sdft.config.command import compose

    cfg: Any = OmegaConf.to_container(compose("train", ["name=x", "run_dir=run"]), resolve=False)
    keys = [key for key, value in leaves(cfg) if isinstance(value, int | float | str | bool | None)]
    keys = [key for key in keys if "._" not in f".{key}" and not key.startswith(("prompts", "dry_run"))]
    chance = random.Random(0)
    for key in keys:
        for value in chance.sample(VALUES, 4):
            yield Try(
                "option values", f"{key}={value}", [*TRAIN, "dry_run=true", "run_dir=run", f"{key}={value}"], code=None
            )
    for words, says in {
        "size=100000000": "size=100000000: must be less than or equal to 16384",
        "data.batch_size=100000000": "data.batch_size=100000000: must be less",
        "rank=99999999": "rank=99999999: must be less than or equal to 4096",
        "rank=0": "rank=0: must be greater",
        "trainer.devices=0": "trainer.devices=0",
        "trainer.devices=-2": "trainer.devices=-2",
        "trainer.devices=1000000": "trainer.devices=1000000",
        "trainer.accelerator=gpu": "trainer.accelerator=gpu: there is no GPU",
        "trainer.precision=bf16-true": "trainer.precision=bf16-true",
        "trainer.num_nodes=2": "trainer.num_nodes=2: a launcher",
        "run_dir=": "run_dir is empty",
        "name=../../x": "name='../../x'",
        "name=a/b": "name='a/b'",
        "caption='{caption.__class__}'": "caption=",
        "caption='{caption!r}'": "nothing else in the braces",
        "caption='{caption:>9999999999}'": "nothing else in the braces",
        "caption='{0}'": "nothing else in the braces",
        "caption='{caption'": "a brace of the text itself is written twice",
        "data=webdataset data.shards='{0..999999999999}.tar'": "more than 100,000 shards",
        "data=folder data.root=nowhere": "data.root=nowhere",
        "resume=nowhere": "resume=nowhere",
        "experiment=dreamy": "did you mean 'dreamy_style'",
        "trainer.max_stepz=3": "did you mean 'trainer.max_steps'",
        "objective=v_predicton": "objective",
        "--resolve": "--resolve goes with --cfg",
        "--fast": "is not a flag",
    }.items():
        given = [word for word in SHORT if not word.startswith(("data.", "run_dir=" if "run_dir" in words else "-"))]
        yield Try("options by hand", words, [*TRAIN, *given, *words.split(" ")], says=says)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the values that are no dicts."""
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leaves(value, name)
        else:
            yield name, value


def nano_file() -> Path:
    """nano as a single file, made once."""
    if not (path := Path(tempfile.gettempdir()) / f"sdft_tries_nano_{os.getuid()}.safetensors").is_file():
        from sdft.formats.model_checkpoint import open_checkpoint
        from sdft.formats.single_file import write_single_file
        from sdft.models.nano import WEIGHTS

        part = path.with_suffix(f".{os.getpid()}")
        write_single_file(open_checkpoint("in", WEIGHTS), part)
        part.replace(path)
    return path


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def changed(content: bytes, change: Callable[[dict[str, Any], str], Any]) -> bytes:
    """A safetensors file after `change` of its header, called with the name of a tensor."""
    header, rest = header_of(content)
    change(header, [name for name in header if name != "__metadata__"][:4][-1])
    return with_header(header, rest)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


class Evil:
    """Leaves the mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "cut in the header": lambda c: c[:300],
    "cut in the weights": lambda c: c[: len(c) // 2],
    "one byte short": lambda c: c[:-1],
    "one byte more": lambda c: c + b"x",
    "a header of no length": lambda c: bytes(8) + c[8:],
    "a header of 2^63 bytes": lambda c: (2**63 - 1).to_bytes(8, "little") + c[8:],
    "a header that is no JSON": lambda c: with_header(b"x" * 400, header_of(c)[1]),
    "a header that is a list": lambda c: with_header([1, 2], header_of(c)[1]),
    "a header of nested lists": lambda c: with_header(b"[" * 100_000, b""),
    "an entry that is text": lambda c: changed(c, lambda h, n: h.update({n: "x"})),
    "an unknown dtype": lambda c: changed(c, lambda h, n: h[n].update(dtype="F7")),
    "an integer dtype": lambda c: changed(c, lambda h, n: h[n].update(dtype="I32")),
    "a negative shape": lambda c: changed(c, lambda h, n: h[n].update(shape=[-1])),
    "a huge shape": lambda c: changed(c, lambda h, n: h[n].update(shape=[2**62, 4])),
    "offsets beyond the end": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 2**40])),
    "offsets that overlap": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 8])),
    "offsets of three": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 1, 2])),
    "metadata that are numbers": lambda c: changed(c, lambda h, n: h.update(__metadata__={"a": 1})),
    "a tensor renamed": lambda c: changed(c, lambda h, n: h.update({"surprise": h.pop(n)})),
    "a tensor missing": lambda c: changed(c, lambda h, n: h.pop(n)),
    "a name of 10,000 letters": lambda c: changed(c, lambda h, n: h.update({"x" * 10_000: h.pop(n)})),
    "a pickle": lambda c: pickle.dumps({"state_dict": {}}),
    "a pickle that runs a command": lambda c: pickle.dumps(Evil()),
    "a zip": lambda c: zipped(),
    "a page of the web": lambda c: b"<html><body>404 Not Found</body></html>" * 9,
    "zeros": lambda c: bytes(4096),
    "a picture": lambda c: b"\x89PNG\r\n\x1a\n" + bytes(99),
}


def write(file: str, content: Callable[[], bytes], folder: Path) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content())


def models() -> Iterator[Try]:
    verbs = {
        "train": [*TRAIN, *SHORT, "model.weights=m.safetensors"],
        "merge": [*MERGE, "a=m.safetensors", "b=nano", "out=o.safetensors"],
        "convert": [*FORMATS, "in=m.safetensors", "out=o", "to=folder", "config=nano"],
    }
    for damage, change in DAMAGES.items():
        for verb, words in verbs.items():
            make = partial(write, "m.safetensors", lambda change=change: change(nano_file().read_bytes()))
            yield Try("model files", f"{damage}, {verb}", words, make, says="m.safetensors")
    for name, tensors, says in [
        ("NaN", {"nan": True}, "NaN or infinite"),
        ("no VAE", {"drop": "first_stage_model."}, "VAE"),
        ("no UNet", {"drop": "model.diffusion_model."}, "m.safetensors"),
        ("no text encoder", {"drop": "conditioner.embedders.0."}, "m.safetensors"),
        ("no second text encoder", {"drop": "conditioner.embedders.1."}, "m.safetensors"),
        (
            "a layer missing",
            {"drop": "conditioner.embedders.0.transformer.text_model.encoder.layers.1."},
            "m.safetensors",
        ),
    ]:
        for verb, words in verbs.items():
            if (name, verb) not in (("NaN", "convert"), ("NaN", "merge")):
                said = "text_encoder" if (name, verb) == ("a layer missing", "merge") else says
                yield Try("model files", f"{name}, {verb}", words, partial(altered, **tensors), says=said)
    yield Try("model files", "NaN, merge", verbs["merge"], partial(altered, nan=True), says="NaN")


def altered(folder: Path, drop: str = "\0", nan: bool = False) -> None:
    tensors = {name: t for name, t in load_file(nano_file()).items() if not name.startswith(drop)}
    if nan:
        tensors["model.diffusion_model.out.2.bias"] = torch.full_like(
            tensors["model.diffusion_model.out.2.bias"], torch.nan
        )
    save_file(tensors, folder / "m.safetensors")


def loras() -> Iterator[Try]:
    a, b, name = torch.ones(2, 8), torch.ones(8, 2), f"lora_unet_{LAYER}"
    good = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    contents = {damage: partial(change, LORAS[0] + b"") for damage, change in DAMAGES.items() if "tensor" not in damage}
    contents.pop("offsets of three")
    for what, tensors in {
        "NaN": {**good, f"{name}.lora_up.weight": torch.full((8, 2), torch.nan)},
        "trained norms": {**good, f"{name}.w_norm": a},
        "whole weights": {**good, f"{name}.diff": a},
        "OFT": {f"{name}.oft_blocks": a},
        "GLoRA": {f"{name}.a1.weight": a, f"{name}.a2.weight": a},
        "IA3": {f"{name}.on_input": a},
        "a bundled embedding": {**good, "bundle_emb.x.string_to_param": a},
        "an embedding": {"emb_params": a},
        "norms of columns": {**good, f"{name}.dora_scale": torch.ones(1, 8)},
        "an orphan alpha": {**good, "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)},
        "ranks that differ": {**good, f"{name}.lora_down.weight": torch.ones(3, 8)},
        "rank zero": {f"{name}.lora_down.weight": torch.ones(0, 8), f"{name}.lora_up.weight": torch.ones(8, 0)},
        "Stable Diffusion 1": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a},
        "Flux": {"lora_transformer_single_blocks_0.lora_down.weight": a},
        "no layer of SDXL": {"lora_unet_nowhere.lora_down.weight": a, "lora_unet_nowhere.lora_up.weight": b},
        "5,000 unknown layers": {f"lora_unet_no_{i}.lora_down.weight": torch.ones(1) for i in range(5000)},
    }.items():
        contents[what] = lambda tensors=tensors: save({key: t.clone() for key, t in tensors.items()})
    verbs = {
        "convert": [*FORMATS, "in=l.safetensors", "out=o.safetensors", "to=diffusers"],
        "bake": [*MERGE, "merge=bake", "base=nano", "lora=l.safetensors", "out=o.safetensors"],
        "compare": [*EVAL, *ONE_IMAGE, "subjects={base: nano, it: l.safetensors}"],
    }
    for what, content in contents.items():
        for verb, words in verbs.items():
            yield Try(
                "LoRA files", f"{what}, {verb}", words, partial(write, "l.safetensors", content), says="l.safetensors"
            )


def alias(number: int) -> str:
    """Nine times the alias before."""
    before, own = chr(97 + number), chr(98 + number)
    return f"{own}: &{own} [{','.join([f'*{before}'] * 9)}]\n"


TEXTS = {
    "empty": "",
    "a list": "- a\n- b\n",
    "a number": "7\n",
    "a word": "word\n",
    "null": "null\n",
    "true": "true",
    "no YAML": "a: [1\nb: }",
    "a tab": "a:\n\t- b",
    "a tag": "a: !!python/object/apply:os.system [touch the_attack_ran]\n",
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(map(alias, range(9))),
    "an alias of itself": "a: &a [*a]\n",
    "nested 10,000 deep": "a: " + "[" * 10_000,
    "binary": "\0\1\2\3\x7f\x80",
    "a circle": "a: ${b}\nb: ${a}\n",
    "an interpolation of nothing": "a: ${nowhere}\n",
    "the environment": "a: ${oc.env:HOME}\n",
    "a number of 10,000 digits": "a: " + "9" * 10_000,
}
JSONS = {
    "empty": "",
    "a list": "[1, 2]",
    "a number": "7",
    "a text": '"x"',
    "null": "null",
    "cut": '{"overrides": ["ra',
    "binary": "\0\1\2\x80",
    "nested 100,000 deep": "[" * 100_000,
    "an object without keys": "{}",
    "outputs alone": '{"outputs": {}}',
    "overrides that are text": '{"overrides": "rank=4", "outputs": {}}',
    "overrides of numbers": '{"overrides": [1, 2], "outputs": {}}',
    "outputs that are a list": '{"overrides": [], "outputs": []}',
    "an override that is none": '{"overrides": ["==="], "outputs": {}}',
    "config that is text": '{"overrides": ["rank=2"], "outputs": {}, "figures": {}, "config": "x"}',
    "threads that are text": '{"overrides": ["rank=2"], "outputs": {}, "figures": {}, "config": {}, "threads": "x"}',
}


def text(file: str, content: str, folder: Path) -> None:
    write(file, lambda: content.encode("latin-1"), folder)


def old_run(folder: Path, **files: str | bytes | None) -> None:
    """The run of a fixture, with some files replaced (`__` stands for `/`), or removed."""
    shutil.copytree(OLD_RUN, folder / "old")
    shutil.copy(OLD_RUN / "lora.safetensors", folder / "old" / "lora_kohya.safetensors")
    shutil.copy(OLD_RUN / "checkpoints" / "last.ckpt", folder / "old" / "checkpoints" / "step_000002.ckpt")
    (folder / "old" / "before_after.png").write_bytes(png())
    for name, content in files.items():
        path = folder / "old" / name.replace("__", "/")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode("latin-1") if isinstance(content, str) else content)


def old_sweep(folder: Path, **files: str | bytes | None) -> None:
    old_run(folder, **files)
    (folder / "sweep").mkdir()
    shutil.move(folder / "old", folder / "sweep" / "0")
    old_run(folder)
    shutil.move(folder / "old", folder / "sweep" / "1")


def files_of_runs() -> Iterator[Try]:
    for what, content in JSONS.items():
        make = partial(text, "receipt.json", content)
        yield Try("receipts", what, [*TRAIN, *SHORT, "reproduce=receipt.json"], make)
        yield Try("receipts", f"{what}, dry run", [*TRAIN, "dry_run=true", "reproduce=receipt.json"], make, code=None)
    yield Try("receipts", "missing", [*TRAIN, *SHORT, "reproduce=receipt.json"], says="there is no such file")
    yield Try("receipts", "a folder", [*TRAIN, *SHORT, "reproduce=."], says="there is no such file")
    compare = [*EVAL, *ONE_IMAGE, "subjects={base: nano, it: old}"]
    for what, content in JSONS.items():
        changes = {"summary.json": content}
        yield Try("run folders", f"summary: {what}", compare, partial(old_run, **changes), code=None)
    for what, content in TEXTS.items():
        changes = {".hydra__config.yaml": content}
        words = [*compare, "axes.step=all"]
        code = 2 if what not in ("the environment",) else None
        yield Try("run folders", f"config: {what}", words, partial(old_run, **changes), code=code)
        yield Try(
            "sweeps",
            f"config: {what}",
            [*EVAL, *ONE_IMAGE, "sweep=sweep", "axes.step=all"],
            partial(old_sweep, **changes),
            code=None,
        )
        yield Try(
            "sweeps",
            f"overrides: {what}",
            [*EVAL, *ONE_IMAGE, "sweep=sweep"],
            partial(old_sweep, **{".hydra__overrides.yaml": content}),
            code=None,
        )
        yield Try(
            "recipes",
            what,
            [*MERGE, "merge=recipe", "file=r.yaml", "out=o.safetensors"],
            partial(text, "r.yaml", content),
            says="file=r.yaml",
        )
    for what, content in {
        "steps that are a list": "steps: [a, b]",
        "a step that is text": "steps: {a: b}",
        "a step that is a list": "steps: {a: [1]}",
        "a method that is a dict": "steps: {a: {method: {x: y}}}",
        "no method": "steps: {a: {a: nano, b: nano}}",
        "a method that does not exist": "steps: {a: {method: weighted, a: nano, b: nano}}",
        "a method of another package": "steps: {a: {method: os.system, a: nano}}",
        "inputs that are numbers": "steps: {a: {method: weighted_sum, a: 1, b: 2}}",
        "a circle of steps": "steps: {a: {method: weighted_sum, a: b, b: b}, b: {method: weighted_sum, a: a, b: a}}",
        "two results": "steps: {a: {method: linear, models: [nano]}, b: {method: linear, models: [nano]}}",
        "alpha that is text": "steps: {a: {method: weighted_sum, a: nano, b: nano, alpha: much}}",
        "alpha of 2": "steps: {a: {method: weighted_sum, a: nano, b: nano, alpha: 2}}",
        "a file that is missing": "steps: {a: {method: weighted_sum, a: x.safetensors, b: nano}}",
        "an unknown key": "steps: {a: {method: weighted_sum, a: nano, b: nano}}\nmore: 1",
    }.items():
        yield Try(
            "recipes",
            what,
            [*MERGE, "merge=recipe", "file=r.yaml", "out=o.safetensors"],
            partial(text, "r.yaml", content),
        )
    for name in ("lora.safetensors", "summary.json", ".hydra__config.yaml", "checkpoints__step_000002.ckpt"):
        yield Try(
            "run folders", f"without {name}", [*compare, "axes.step=all"], partial(old_run, **{name: None}), code=None
        )


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def checkpoints() -> Iterator[Try]:
    whole = (OLD_RUN / "checkpoints" / "last.ckpt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    contents: dict[str, bytes] = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "one byte flipped": bytes(flipped),
        "text": b"text" * 99,
        "a zip": zipped(),
        "a pickle that runs a command": pickle.dumps(Evil()),
        "a checkpoint that runs a command": saved({"state_dict": {}, "x": Evil()}),
        "a list": saved([1, 2]),
        "a tensor": saved(torch.ones(3)),
        "a state dict": saved({"a.weight": torch.ones(3)}),
        "of another program": saved({"state_dict": {"a": torch.ones(2)}, "global_step": 3, "epoch": 1}),
        "without callbacks": saved({"state_dict": {}, "global_step": 3, "loops": {}}),
        "of other weights": saved({"state_dict": {"a": torch.ones(2)}, "global_step": 3, "callbacks": {}, "loops": {}}),
        "of another tuning": whole,
        "safetensors": LORAS[0],
    }
    for what, content in contents.items():
        yield Try(
            "checkpoints",
            f"{what}, resume",
            [*TRAIN, *SHORT, "resume=x.ckpt"],
            partial(write, "x.ckpt", lambda c=content: c),
        )
        if what != "of another tuning":
            make = partial(old_run, **{"checkpoints__step_000002.ckpt": content})
            words = [*EVAL, *ONE_IMAGE, "subjects={it: old}", "axes.step=all"]
            yield Try("checkpoints", f"{what}, compare", words, make, code=None)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path)


def pictures(folder: Path, table: str = "", name: str = "metadata.csv", captions: bool = False) -> None:
    for number in range(4):
        picture(folder / "d" / f"{number}.png")
        if captions:
            (folder / "d" / f"{number}.txt").write_text("a cat")
    if table:
        (folder / "d" / name).write_bytes(table.encode("latin-1"))


def tar_with(folder: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    return buffer.getvalue()


def data() -> Iterator[Try]:
    whole = TARS[0]
    shards: dict[str, Callable[[Path], Any]] = {
        "empty": partial(write, "x.tar", lambda: b""),
        "cut": partial(write, "x.tar", lambda: whole[:700]),
        "cut in a header": partial(write, "x.tar", lambda: whole[:300]),
        "text": partial(write, "x.tar", lambda: b"text" * 999),
        "zeros": partial(write, "x.tar", lambda: bytes(10240)),
        "a folder": lambda folder: (folder / "x.tar").mkdir(),
        "a path out of it": lambda folder: tar_with(folder, ("../evil.png", png()), ("../evil.txt", b"x")),
        "an absolute path": lambda folder: tar_with(folder, ("/etc/evil.png", png()), ("/etc/evil.txt", b"x")),
        "a link": lambda folder: tar_with(folder, ("a.png", special("a.png", tarfile.SYMTYPE)), ("a.txt", b"x")),
        "a hard link": lambda folder: tar_with(folder, ("a.png", special("a.png", tarfile.LNKTYPE)), ("a.txt", b"x")),
        "a device": lambda folder: tar_with(folder, ("a.png", special("a.png", tarfile.CHRTYPE)), ("a.txt", b"x")),
        "the same name twice": lambda folder: tar_with(folder, ("a.png", png()), ("a.png", png()), ("a.txt", b"x")),
        "no captions": lambda folder: tar_with(folder, ("a.png", png()), ("b.png", png())),
        "no pictures": lambda folder: tar_with(folder, ("a.txt", b"x"), ("b.txt", b"x")),
        "a broken picture": lambda folder: tar_with(
            folder, *(p for k in "ab" for p in ((f"{k}.png", b"x"), (f"{k}.txt", b"x")))
        ),
        "one sample": lambda folder: tar_with(folder, ("a.png", png()), ("a.txt", b"x")),
        "JSON that is none": lambda folder: tar_with(
            folder, ("a.png", png()), ("a.json", b"{"), ("b.png", png()), ("b.json", b"[]")
        ),
        "text that is no UTF-8": lambda folder: tar_with(folder, ("a.png", png()), ("a.txt", b"\xff\xfe\x00")),
    }
    for what, make in shards.items():
        yield Try("shards", what, [*TRAIN, *SHORT[:-2], "data=webdataset", "data.shards=x.tar"], make, says="x.tar")
    for pattern in (
        "{0..999999999999}.tar",
        "{a..z}{0..9999}{0..9999}.tar",
        "{0..5",
        "x{1}.tar",
        "''",
        "{" * 3000,
        "missing.tar",
    ):
        words = [
            *TRAIN,
            *SHORT[:-2],
            "data=webdataset",
            f"data.shards='{pattern}'" if pattern != "''" else "data.shards=''",
        ]
        yield Try("shards", f"pattern {pattern[:30]}", words, says="data.shards")
    folder_words = ["data=folder", "data.root=d"]
    tables = {
        "an unclosed quote": 'file_name,text\n0.png,"a cat\n1.png,b\n2.png,c\n3.png,d\n',
        "no column file_name": "name,text\n0.png,a\n",
        "no column of captions": "file_name,label\n0.png,a\n",
        "a row twice": "file_name,text\n0.png,a\n0.png,b\n1.png,c\n",
        "NUL bytes": "file_name,text\n0.png,a\0b\n",
        "no UTF-8": "file_name,text\n0.png,caf\xe9\n",
        "empty": " ",
        "a header alone": "file_name,text\n",
        "an empty caption": "file_name,text\n0.png,\n1.png,a\n2.png,a\n3.png,a\n",
        "a path out of it": "file_name,text\n../../0.png,a\n",
        "binary": "\x89PNG\r\n\x1a\n\0\0",
    }
    for what, table in tables.items():
        yield Try(
            "captions and tables", f"csv: {what}", [*TRAIN, *SHORT[:-2], *folder_words], partial(pictures, table=table)
        )
    for what, table in {
        "no JSON": "{\n",
        "a list": "[1]\n",
        "numbers": '{"file_name": 1, "text": 2}\n',
        "a caption that is a number": '{"file_name": "0.png", "text": 3}\n',
        "weights that do not fit": '{"file_name": "0.png", "text": ["a"], "weights": [1, 2]}\n',
        "weights of zero": '{"file_name": "0.png", "text": ["a"], "weights": [0]}\n',
        "weights that are infinite": '{"file_name": "0.png", "text": ["a"], "weights": [1e999]}\n',
        "nested 100,000 deep": "[" * 100_000 + "\n",
        "no UTF-8": '{"file_name": "0.png", "text": "caf\xe9"}\n',
    }.items():
        make = partial(pictures, table=table, name="metadata.jsonl")
        yield Try("captions and tables", f"jsonl: {what}", [*TRAIN, *SHORT[:-2], *folder_words], make)
    for what, prepare in {
        "no captions": pictures,
        "an empty folder": lambda folder: (folder / "d").mkdir(),
        "a file": partial(text, "d", "x"),
        "one picture": lambda folder: picture(folder / "d" / "0.png"),
        "broken pictures": lambda folder: [write(f"d/{i}.png", lambda: b"x", folder) for i in range(4)],
        "captions that are no UTF-8": lambda folder: (
            pictures(folder),
            [write(f"d/{i}.txt", lambda: b"\xff\xfe", folder) for i in range(4)],
        ),
        "empty captions": lambda folder: (
            pictures(folder),
            [write(f"d/{i}.txt", lambda: b" \n", folder) for i in range(4)],
        ),
    }.items():
        yield Try("captions and tables", f"folder: {what}", [*TRAIN, *SHORT[:-2], *folder_words], prepare)
    for words, says in {
        "look=nope": "look=nope",
        "count=0": "count=0",
        "count=-1": "count=-1",
        "count=99999999999": "count=99999999999",
        "size=0": "size=0",
        "size=99999999": "size=99999999",
        "split=x": "split=x",
        "caption={x}": "caption=",
        "out=": "out",
    }.items():
        yield Try(
            "captions and tables",
            f"toy {words}",
            ["-m", "sdft.data", "toy", *([] if words == "out=" else ["out=t"]), words],
            says=says,
        )
    for verb in ("toy", "check", "shard", "cache", "nothing"):
        yield Try("captions and tables", f"data {verb} alone", ["-m", "sdft.data", verb])


def long_name(folder: Path) -> None:
    pictures(folder, captions=True)


def places() -> Iterator[Try]:
    def a_file(folder: Path) -> None:
        pictures(folder, captions=True)
        (folder / "f").write_text("mine")

    def a_model_with_notes(folder: Path) -> None:
        from sdft.models.nano import WEIGHTS

        shutil.copytree(WEIGHTS, folder / "m", ignore=shutil.ignore_patterns("clip"))
        (folder / "m" / "notes.txt").write_text("mine")

    long = "x" * 300
    verbs = {
        "train": [*TRAIN, *SHORT[:4], *SHORT[5:], "run_dir={}"],
        "compare": [*EVAL, *ONE_IMAGE[:3], "size=32", "subjects={{a: nano}}", "run_dir={}"],
        "merge": [*MERGE, "a=nano", "b=nano", "out={}", "to=folder", "config=nano"],
        "convert": [*FORMATS, "in={}/d", "out=o"],
        "toy": ["-m", "sdft.data", "toy", "count=2", "out={}"],
        "shard": ["-m", "sdft.data", "shard", "root=d", "out={}"],
        "check": ["-m", "sdft.data", "check", "data.root=d", "size=64", "out={}"],
    }
    for what, place in {
        "a file": "f",
        "below a file": "f/x",
        "300 letters": long,
        "below 300 letters": f"{long}/x",
        "5,000 letters": "/".join(["y" * 99] * 50),
        "/proc": "/proc/x",
        "empty": "''",
    }.items():
        for verb, words in verbs.items():
            if verb != "convert":
                yield Try("places to write", f"{verb}, {what}", [word.format(place) for word in words], a_file)
    yield Try(
        "places to write",
        "merge, a model with notes",
        [*MERGE, "a=nano", "b=nano", "out=m", "overwrite=true", "config=nano"],
        a_model_with_notes,
        says="notes.txt",
    )
    yield Try(
        "places to write",
        "convert, a missing input",
        [*FORMATS, "in=no.safetensors", "out=o", "to=folder"],
        says="there is no such file",
    )
    yield Try("places to write", "convert, into itself", [*FORMATS, "in=nano", "out=nano/x", "to=folder"])
    yield Try("places to write", "merge, exists", [*MERGE, "a=nano", "b=nano", "out=f"], a_file)


def attacks() -> Iterator[Try]:
    """Through every file that people pass to each other; the mark is a file that the attack would make."""
    targets = [
        "os.system",
        "subprocess.getoutput",
        "builtins.exec",
        "builtins.eval",
        "pathlib.Path.touch",
        "torch.load",
        "hydra.utils.get_method",
        "importlib.import_module",
        "my_attack.go",
    ]

    def attack_module(folder: Path) -> None:
        (folder / "my_attack.py").write_text(
            f"open({MARK!r}, 'w').close()\ndef go(*a, **k): open({MARK!r}, 'w').close()\n"
        )

    def run(folder: Path, key: str, node: Any) -> None:
        attack_module(folder)
        old_run(folder)
        config = folder / "old" / ".hydra" / "config.yaml"
        tree = yaml.safe_load(config.read_text())
        tree[key] = node
        config.write_text(yaml.safe_dump(tree))

    def receipt(folder: Path, override: str) -> None:
        attack_module(folder)
        text("receipt.json", json.dumps({"overrides": ["experiment=dreamy_style", override], "outputs": {}}), folder)

    def recipe(folder: Path, method: str) -> None:
        attack_module(folder)
        text("r.yaml", f"steps:\n  a: {{method: {method}, a: nano, b: nano}}\n", folder)

    at_steps = [*EVAL, *ONE_IMAGE, "subjects={it: old}", "axes.step=all"]
    for target in targets:
        node = {"_target_": target, "_args_": [f"touch {MARK}"]}
        for key in ("model", "objective", "tuning"):
            yield Try(
                "attacks", f"run folder, {key}: {target}", at_steps, partial(run, key=key, node=node), says="trust="
            )
        override = f"+callbacks.x={{_target_: {target}, _args_: [touch {MARK}]}}"
        for dry in ("true", "false"):
            words = [*TRAIN, "reproduce=receipt.json", f"dry_run={dry}"]
            yield Try(
                "attacks",
                f"receipt, dry_run={dry}: {target}",
                words,
                partial(receipt, override=override),
                says="trust=",
            )
        yield Try(
            "attacks",
            f"recipe: {target}",
            [*MERGE, "merge=recipe", "file=r.yaml", "out=o.safetensors"],
            partial(recipe, method=target),
            says="trust=",
        )
    for what, override in {
        "pipe": f"data.shards='pipe:touch {MARK}'",
        "the environment": "name='${oc.env:HOME}'",
        "allow_pickle": "model.allow_pickle=true",
        "Hydra": "hydra.searchpath=[file:///tmp]",
    }.items():
        for dry in ("true", "false"):
            yield Try(
                "attacks",
                f"receipt, dry_run={dry}: {what}",
                [*TRAIN, "reproduce=receipt.json", f"dry_run={dry}"],
                partial(receipt, override=override),
            )
    evil = {"m.ckpt": pickle.dumps(Evil()), "m.safetensors": pickle.dumps(Evil()), "m.bin": saved({"x": Evil()})}
    for file, content in evil.items():
        for verb, words in {
            "train": [*TRAIN, *SHORT, f"model.weights={file}"],
            "train, allow_pickle": [*TRAIN, *SHORT, f"model.weights={file}", "model.allow_pickle=true"],
            "convert": [*FORMATS, f"in={file}", "out=o", "to=folder", "config=nano", "allow_pickle=true"],
        }.items():
            yield Try("attacks", f"pickle {file}, {verb}", words, partial(write, file, lambda c=content: c), says=file)
    for what in ("a tag", "an alias bomb"):
        make = partial(old_run, **{".hydra__config.yaml": TEXTS[what]})
        yield Try("attacks", f"run folder, {what}", at_steps, make)


KINDS = [options, models, loras, files_of_runs, checkpoints, data, places, attacks]


def all_tries() -> list[Try]:
    """Every try, in the order of its kind."""
    return [one for kind in KINDS for one in kind()]


def main() -> None:
    """Run the tries and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", default="", help="only kinds with these words in their name")
    parser.add_argument("--only", default="", help="only tries with these words in their name")
    asked = parser.parse_args()
    tries = [one for one in all_tries() if asked.kind in one.kind and asked.only in one.name]
    nano_file()
    held: dict[str, list[bool]] = {}
    with (
        WarmPython(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1") as python,
        ThreadPoolExecutor(2) as pool,
    ):
        for number, (one, problem) in enumerate(
            zip(tries, pool.map(partial(outcome, python=python), tries), strict=True), 1
        ):
            held.setdefault(one.kind, []).append(not problem)
            if problem:
                print(f"{one.kind}: {one.name}: {problem}", flush=True)
            print(f"{number} of {len(tries)}", file=sys.stderr, flush=True)
    print("\n| kind | tries | held |\n|---|---|---|")
    for kind, results in held.items():
        print(f"| {kind} | {len(results)} | {sum(results)} |")
    everything = [one for results in held.values() for one in results]
    print(f"| all | {len(everything)} | {sum(everything)} |")
    raise SystemExit(not all(everything))


if __name__ == "__main__":
    main()
