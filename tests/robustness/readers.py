"""Fuzzes the readers of strangers' files: whatever the bytes, they read them or raise a UserError, within seconds.

    PYTHONPATH=tests python tests/robustness/readers.py lora|shards|recipes [--minutes 30]

hypothesis draws how a good file is damaged; what broke is printed with the example.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from sdft.errors import UserError

SECONDS = 5
"""Of computing, for one file."""
LAYER = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 10**40, 1e300]),
    st.integers(-3, 100),
    st.floats(),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def lora_bytes() -> list[bytes]:
    """Small LoRA files of several layouts."""
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    kohya = {f"lora_unet_{LAYER}.lora_down.weight": a, f"lora_unet_{LAYER}.lora_up.weight": b}
    alpha = {f"lora_unet_{LAYER}.alpha": torch.tensor(1.0)}
    dora = {f"lora_unet_{LAYER}.dora_scale": torch.ones(8, 1)}
    peft = {f"{PEFT}.lora_A.weight": a, f"{PEFT}.lora_B.weight": b}
    loha = {f"lora_unet_{LAYER}.hada_w{i}_{x}": torch.ones(8, 2) if x == "a" else a for i in (1, 2) for x in "ab"}
    lokr = {f"lora_unet_{LAYER}.lokr_w1": torch.ones(2, 2), f"lora_unet_{LAYER}.lokr_w2": torch.ones(4, 4)}
    described = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}})}
    files = [(kohya | alpha, None), (kohya | dora, None), (peft, described), (loha | alpha, None), (lokr, None)]
    return [save({name: t.clone() for name, t in tensors.items()}, metadata) for tensors, metadata in files]


def tar_bytes() -> list[bytes]:
    """A small shard, with and without compressed headers of other formats."""
    shards = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer, picture = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(picture, "png")
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for number in range(3):
                parts = {"png": picture.getvalue(), "txt": b"a cat", "json": b'{"text": ["a", "b"], "weights": [1, 2]}'}
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(
                        f"{number:04}.{suffix}" if number < 2 else f"{'long/' * 40}{number}.{suffix}"
                    )
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards.append(buffer.getvalue())
    return shards


RECIPE = """
numbers: {share: 0.5}
steps:
  first: {method: weighted_sum, a: nano, b: nano, alpha: "${numbers.share}"}
  second:
    method: ties
    base: nano
    models: [first, nano]
    density: 0.3
"""


@st.composite
def damaged(draw: Any, originals: list[bytes]) -> bytes:
    """A good file with a few changes: bytes flipped, cut, repeated, inserted."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        match draw(st.integers(0, 4)):
            case 0:
                content[place : place + 1] = draw(st.binary(max_size=4))
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[: draw(st.integers(0, 600))]
            case 3:
                del content[place : place + draw(st.integers(0, 600))]
            case 4:
                content[place:place] = draw(st.binary(max_size=40))
    return bytes(content)


@st.composite
def with_other_header(draw: Any, originals: list[bytes]) -> bytes:
    """A safetensors file whose header has other names, shapes, offsets, dtypes or metadata."""
    content = draw(st.sampled_from(originals))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = header.get(name)
        match draw(st.integers(0, 6)):
            case 0:
                header[draw(st.text(max_size=60) | st.sampled_from(["x.alpha", f"{name}.alpha", "lora_A.weight"]))] = (
                    entry
                )
            case 1 if isinstance(entry, dict):
                entry["shape"] = draw(st.lists(NUMBERS, max_size=5))
            case 2 if isinstance(entry, dict):
                entry["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
            case 3 if isinstance(entry, dict):
                entry["dtype"] = draw(st.sampled_from(["F16", "F8_E4M3", "BOOL", "I64", "C64", "F4", "", "x"]))
            case 4:
                key = draw(
                    st.sampled_from(["lora_adapter_metadata", "ss_network_dim", "modelspec.prediction_type", "x"])
                )
                value = draw(JSON.map(json.dumps) | st.text(max_size=40) | NUMBERS)
                header["__metadata__"] = {**(header.get("__metadata__") or {}), key: value}
            case 5:
                header[name] = draw(JSON)
            case 6:
                header.pop(name, None)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


LEAVES = st.sampled_from(
    ["nano", "first", "second", "weighted_sum", "ties", "os.system", "${numbers.share}", "${x}", ""]
)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | LEAVES | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["method", "a", "b", "base", "models", "alpha", "density", "steps", "numbers", "first", "x", "_target_"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@st.composite
def recipes(draw: Any) -> bytes:
    """Texts that are almost recipes, and trees of the words of recipes."""
    if draw(st.booleans()):
        return draw(damaged([RECIPE.encode()]))
    import yaml

    steps = draw(st.dictionaries(st.sampled_from(["first", "second", "third"]), TREES, max_size=3))
    tree = draw(st.sampled_from([{"steps": steps}, {"steps": steps, "numbers": draw(TREES)}, steps, draw(TREES)]))
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def read_lora_file(file: Path) -> None:
    from sdft.formats.convert import holds_lora
    from sdft.formats.lora_file import read_lora

    holds_lora(str(file), file)
    for skip_unknown in (False, True):
        try:
            lora = read_lora(file, "in", skip_unknown)
        except UserError:
            continue
        for layer in lora.layers.values():
            _ = layer.kind, layer.rank, layer.delta_shape, layer.peft_tensors


def read_tar(file: Path) -> None:
    from sdft.data.sources.shards import Shards

    source = Shards(str(file), "train", held_out=0.5)
    for index in range(min(len(source.keys), 4)):
        _ = source[index].caption


def read_recipe_file(file: Path) -> None:
    from sdft.merging.recipe import open_recipe
    from sdft.merging.run import read_recipe

    open_recipe(read_recipe(file, {}))


LORAS, TARS = lora_bytes(), tar_bytes()
READERS: dict[str, tuple[Callable[[Path], None], Any, str]] = {
    "lora": (read_lora_file, damaged(LORAS) | with_other_header(LORAS), "x.safetensors"),
    "shards": (read_tar, damaged(TARS), "x.tar"),
    "recipes": (read_recipe_file, recipes(), "x.yaml"),
}
"""Name -> the reader, the files that it gets, and their name."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """Raises TimeoutError after so many seconds of computing, or twelve times as many of waiting."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = [signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)  # on a busy machine the clock says little
    signal.alarm(12 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def outcome(kind: str, content: bytes, folder: Path) -> str:
    """`read` or `refused`; any other error of the reader comes through."""
    reader, _, name = READERS[kind]
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(content)
    with limited(), warnings.catch_warnings(action="ignore"):
        try:
            reader(folder / name)
        except UserError:
            return "refused"
    return "read"


def fuzz(kind: str, minutes: float) -> int:
    """Try files until the time is over; returns how many broke the reader."""
    until, count, broken = time.monotonic() + 60 * minutes, {"read": 0, "refused": 0}, 0
    with tempfile.TemporaryDirectory() as folder:
        seed = 0
        while time.monotonic() < until:
            seed += 1

            @settings(
                max_examples=200, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(READERS[kind][1])
            def attempt(content: bytes) -> None:
                nonlocal broken
                if time.monotonic() > until:
                    return
                try:
                    count[outcome(kind, content, Path(folder))] += 1
                except Exception as error:
                    broken += 1
                    place = Path(tempfile.gettempdir()) / f"broken_{kind}_{broken}"
                    place.write_bytes(content)
                    print(f"{kind}: {type(error).__name__}: {str(error)[:200]} ({place})", flush=True)

            from hypothesis import seed as seeded

            seeded(seed)(attempt)()
            print(f"{kind}: {sum(count.values())} files, {count}, {broken} broke it", file=sys.stderr, flush=True)
    total = sum(count.values()) + broken
    how = ", ".join(f"{number} {what}" for what, number in count.items())
    print(f"{kind}: {total} files in {minutes:g} minutes: {how}, {broken} broke the reader")
    return broken


def main() -> None:
    """Fuzz one reader."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=READERS)
    parser.add_argument("--minutes", type=float, default=30)
    given_words = parser.parse_args()
    raise SystemExit(fuzz(given_words.kind, given_words.minutes) > 0)


if __name__ == "__main__":
    main()
