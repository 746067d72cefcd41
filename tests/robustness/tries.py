"""Commands as people mistype them, with files as strangers damage them: each must be done, or refused in a few lines.

    PYTHONPATH=tests python tests/robustness/tries.py [--kind KIND] [--only WORDS]

Prints a table kind x tries x held, and what did not hold. Each try runs in a process of its own. It holds if it ends
within its time, with exit code 0 or 2 (and the one that it must have), at most 25 lines of error without a traceback,
the words that its message must have, if no attack left its mark or reached the terminal, and if the files that were
there before are as they were.
"""

from __future__ import annotations

import argparse
import pickle
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save, save_file
from warm import WarmPython

from robustness.attacks import attacks, attacks_by_other_doors, control_sequences
from robustness.attempt import (
    EVAL,
    FORMATS,
    MERGE,
    OLD_RUN,
    ONE_IMAGE,
    SHORT,
    TRAIN,
    Try,
    outcome,
)
from robustness.inputs import (
    DAMAGES,
    JSONS,
    TEXTS,
    Evil,
    nano_file,
    old_run,
    old_sweep,
    picture,
    pictures,
    png,
    saved,
    special,
    tar_with,
    text,
    write,
    zipped,
)
from robustness.readers import LAYER, LORAS, TARS

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
            words = [*TRAIN, "dry_run=true", "run_dir=run", f"{key}={value}"]
            yield Try("option values", f"{key}={value}", words, code=None, says=key.rpartition(".")[2])
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


def files_of_runs() -> Iterator[Try]:
    for what, content in JSONS.items():
        make = partial(text, "receipt.json", content)
        yield Try("receipts", what, [*TRAIN, *SHORT, "reproduce=receipt.json"], make, says="receipt.json")
        words = [*TRAIN, "dry_run=true", "reproduce=receipt.json"]
        yield Try("receipts", f"{what}, dry run", words, make, code=None, says="receipt.json")
    yield Try("receipts", "missing", [*TRAIN, *SHORT, "reproduce=receipt.json"], says="there is no such file")
    yield Try("receipts", "a folder", [*TRAIN, *SHORT, "reproduce=."], says="there is no such file")
    compare = [*EVAL, *ONE_IMAGE, "subjects={base: nano, it: old}"]
    for what, content in JSONS.items():
        changes = {"summary.json": content}
        make = partial(old_run, **changes)
        yield Try("run folders", f"summary: {what}", compare, make, code=None, says="old")
    for what, content in TEXTS.items():
        changes = {".hydra__config.yaml": content}
        words = [*compare, "axes.step=all"]
        code = 2 if what not in ("the environment",) else None
        yield Try("run folders", f"config: {what}", words, partial(old_run, **changes), code=code, says="config.yaml")
        yield Try(
            "sweeps",
            f"config: {what}",
            [*EVAL, *ONE_IMAGE, "sweep=sweep", "axes.step=all"],
            partial(old_sweep, **changes),
            code=None,
            says="config.yaml",
        )
        yield Try(
            "sweeps",
            f"overrides: {what}",
            [*EVAL, *ONE_IMAGE, "sweep=sweep"],
            partial(old_sweep, **{".hydra__overrides.yaml": content}),
            code=None,
            says="overrides.yaml",
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
            says="x.ckpt",
        )
        if what != "of another tuning":
            make = partial(old_run, **{"checkpoints__step_000002.ckpt": content})
            words = [*EVAL, *ONE_IMAGE, "subjects={it: old}", "axes.step=all"]
            yield Try("checkpoints", f"{what}, compare", words, make, code=None, says="step_000002.ckpt")


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


KINDS = [
    options,
    models,
    loras,
    files_of_runs,
    checkpoints,
    data,
    places,
    attacks,
    attacks_by_other_doors,
    control_sequences,
]


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
