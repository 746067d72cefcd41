"""Files that run a command, read the environment or write to the terminal, if what opens them lets them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from robustness.attempt import (
    EVAL,
    FORMATS,
    MARK,
    MERGE,
    OLD_RUN,
    ONE_IMAGE,
    SHORT,
    TRAIN,
    Try,
)
from robustness.inputs import (
    TEXTS,
    Evil,
    changed,
    nano_file,
    old_run,
    old_sweep,
    pictures,
    saved,
    tar_with,
    text,
    with_header,
    write,
)
from robustness.readers import LAYER


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


LOAD = """
import sys, sdft, sdft.errors
try:
    sdft.load_model(*sys.argv[1:2], lora=sys.argv[2] if sys.argv[2:] else None)
except sdft.errors.UserError as error:
    sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
"""
DOORS: dict[str, tuple[str, ...]] = {
    "load_model": ("load.py", "{}"),
    "load_model, lora": ("load.py", "nano", "{}"),
    "compare": (*EVAL, *ONE_IMAGE, "subjects={{it: {}}}"),
    "merge": (*MERGE, "a={}", "b=nano", "out=o.safetensors"),
    "bake": (*MERGE, "merge=bake", "base=nano", "lora={}", "out=o.safetensors"),
    "convert": (*FORMATS, "in={}/lora.safetensors", "out=o.safetensors", "to=kohya"),
    "train from it": (*TRAIN, *SHORT, "model.weights={}"),
    "resume": (*TRAIN, *SHORT, "resume={}/checkpoints/last.ckpt"),
}
"""Ways to open a run folder, other than `axes.step` and `sweep`."""


def attacks_by_other_doors() -> Iterator[Try]:
    """Run folders whose config, summary and files attack, through every command that opens one."""
    goes = {"_target_": "my_attack.go"}
    command = f"touch {MARK}"

    def prepared(folder: Path, changes: dict[str, Any], sweep: bool = False) -> None:
        (folder / "load.py").write_text(LOAD)
        (folder / "my_attack.py").write_text(
            f"open({MARK!r}, 'w').close()\ndef go(*a, **k): open({MARK!r}, 'w').close()\n"
        )
        config = yaml.safe_load((OLD_RUN / ".hydra" / "config.yaml").read_text())
        for key, value in changes.items():
            *above, last = key.split(".")
            node = config
            for name in above:
                node = node[name]
            node[last] = value
        (old_sweep if sweep else old_run)(folder, **{".hydra__config.yaml": yaml.safe_dump(config)})

    configs: dict[str, dict[str, Any]] = {
        "model": {"model": goes},
        "weights, the environment": {"model.weights": "${oc.env:HOME}"},
        "weights, a resolver": {"model.weights": "${oc.decode:'1'}"},
        "weights, a node": {"model.weights": goes},
        "weights, a pipe": {"model.weights": f"pipe:{command}"},
        "an optimizer": {"optimizer": {"_target_": "os.system", "command": command}},
        "a callback": {"callbacks": {"x": goes}},
        "a partial": {"objective": {"_partial_": True, "_target_": "subprocess.call", "args": ["touch", MARK]}},
        "deep inside": {"objective.weighting": goes},
        "an object by its path": {"tuning": {"_target_": "hydra.utils.get_object", "path": "my_attack.go"}},
        "a method by its path": {"tuning": {"_target_": "hydra.utils.call", "config": goes}},
        "data": {"data": {"_target_": "sdft.data.sources.shards.Shards", "shards": f"pipe:{command}"}},
    }
    for what, changes in configs.items():
        for door, words in DOORS.items():
            yield Try(
                "attacks by other doors",
                f"{door}: {what}",
                [word.format("old") for word in words],
                partial(prepared, changes=changes),
                code=None,
            )
        yield Try(
            "attacks by other doors",
            f"sweep: {what}",
            [*EVAL, *ONE_IMAGE, "sweep=sweep", "axes.step=all"],
            partial(prepared, changes=changes, sweep=True),
            code=None,
        )
    evil = {"a pickle": pickle.dumps(Evil()), "a checkpoint": saved({"state_dict": {}, "x": Evil()})}
    files = ("lora.safetensors", "lora_kohya.safetensors", "words.safetensors", "checkpoints/last.ckpt")
    for file in (file for file in files if (OLD_RUN / file).exists() or "kohya" in file):
        for what, content in evil.items():
            for door, words in DOORS.items():
                make = partial(with_files, **{file.replace("/", "__"): content})
                words = [word.format("old") for word in words]
                yield Try("attacks by other doors", f"{door}: {file} is {what}", words, make, code=None)
    for what, place in {
        "outside": "../evil.safetensors",
        "of the system": "/etc/passwd",
        "a device": "/dev/full",
    }.items():
        summary = json.loads((OLD_RUN / "summary.json").read_text())
        summary["artifacts"] = dict.fromkeys([*summary.get("artifacts", {}), "lora", "model", "words"], place)
        make = partial(with_files, summary__json=json.dumps(summary))
        for door, words in DOORS.items():
            words = [word.format("old") for word in words]
            yield Try("attacks by other doors", f"{door}: an artifact {what}", words, make, code=None)


def with_files(folder: Path, **files: str | bytes | None) -> None:
    """The run of the fixture with other files, and the script of `load_model` beside it."""
    (folder / "load.py").write_text(LOAD)
    (folder / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    old_run(folder, **{name.replace("summary__json", "summary.json"): content for name, content in files.items()})


def control_sequences() -> Iterator[Try]:
    """Texts of files that would change the terminal's title or clear it, if a message printed them as they are."""
    clear = "\x1b[2J\x1b]0;mine\x07"
    a, b, name = torch.ones(2, 8), torch.ones(8, 2), f"lora_unet_{LAYER}"
    good = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    files: dict[str, tuple[str, bytes]] = {
        "the name of a tensor": ("l.safetensors", save({**good, f"x{clear}.lora_down.weight": a.clone()})),
        "a layer": ("l.safetensors", save({f"lora_unet_{clear}.lora_down.weight": a.clone(), **good})),
        "metadata": ("l.safetensors", save(good, {"modelspec.prediction_type": clear})),
        "metadata of peft": ("l.safetensors", save(good, {"lora_adapter_metadata": json.dumps({clear: clear})})),
        "no JSON": ("l.safetensors", with_header(f"{{{clear}".encode(), b"")),
        "a dtype": ("l.safetensors", changed(save(good), lambda h, n: h[n].update(dtype=clear))),
    }
    for what, (file, content) in files.items():
        for verb, words in {
            "convert": [*FORMATS, f"in={file}", "out=o.safetensors", "to=diffusers"],
            "bake": [*MERGE, "merge=bake", "base=nano", f"lora={file}", "out=o.safetensors"],
        }.items():
            make = partial(write, file, lambda c=content: c)
            yield Try("control sequences", f"{what}, {verb}", words, make, code=None)
    model = changed(nano_file().read_bytes(), lambda h, n: h.update({f"{n}{clear}": h.pop(n)}))
    make = partial(write, "m.safetensors", lambda: model)
    yield Try("control sequences", "a model, merge", [*MERGE, "a=m.safetensors", "b=nano", "out=o.safetensors"], make)
    yield Try("control sequences", "a model, train", [*TRAIN, *SHORT, "model.weights=m.safetensors"], make)
    quoted = json.dumps(clear)
    for what, content in {
        "a key": f"{quoted}: 1",
        "the name of a step": f"steps: {{{quoted}: {{method: weighted_sum, a: nano}}}}",
        "a method": f"steps: {{a: {{method: {quoted}, a: nano, b: nano}}}}",
        "an input": f"steps: {{a: {{method: weighted_sum, a: {quoted}, b: nano}}}}",
        "a setting": f"steps: {{a: {{method: weighted_sum, a: nano, b: nano, {quoted}: 1}}}}",
    }.items():
        words = [*MERGE, "merge=recipe", "file=r.yaml", "out=o.safetensors"]
        yield Try("control sequences", f"a recipe, {what}", words, partial(text, "r.yaml", content))
    for what, override in {"a key": f"{clear}=1", "a value": f"rank={clear}", "a name": f"name='{clear}'"}.items():
        content = json.dumps({"overrides": [override], "outputs": {}})
        make = partial(text, "receipt.json", content)
        yield Try("control sequences", f"a receipt, {what}", [*TRAIN, "reproduce=receipt.json", "dry_run=true"], make)
    for what, node in {"a target": {"_target_": clear}, "a key": {clear: 1}, "a value": clear}.items():
        config = yaml.safe_load((OLD_RUN / ".hydra" / "config.yaml").read_text())
        make = partial(old_run, **{".hydra__config.yaml": yaml.safe_dump({**config, "objective": node})})
        words = [*EVAL, *ONE_IMAGE, "subjects={it: old}", "axes.step=all"]
        yield Try("control sequences", f"a run folder, {what}", words, make, code=None)
    shards = [*TRAIN, *SHORT[:-2], "data=webdataset", "data.shards=x.tar"]
    names = {"a member": f"{clear}.png", "a member without a picture": f"{clear}.json"}
    for what, member in names.items():
        yield Try("control sequences", f"a shard, {what}", shards, partial(shard_of, name=member))
    folder_words = [*TRAIN, *SHORT[:-2], "data=folder", "data.root=d"]
    for what, row in {
        "a file's name": {"file_name": f"{clear}.png", "text": "a"},
        "a caption": {"file_name": "0.png", "text": clear},
        "a column": {clear: "0.png", "text": "a"},
    }.items():
        make = partial(pictures, table=json.dumps(row) + "\n", name="metadata.jsonl")
        yield Try("control sequences", f"a table, {what}", folder_words, make)


def shard_of(folder: Path, name: str) -> None:
    """A shard with one member that is no picture."""
    tar_with(folder, (name, b"x"))
