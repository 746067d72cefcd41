"""Merges of SDXL's size, compared with `cp` and `cat` of the same bytes, and with a script that loads whole models.

    python -m benchmarks.merging [FOLDER] [--scale 1.0] [--only "cat of two,write and fsync,weighted sum"]

Full size makes files of 21 GB, and needs 28 GB of room. With `--only`, just some of the lines, and their ratios.

Three single files of random fp16 numbers with SDXL's names, widths times `scale`; those of an earlier run in FOLDER are
used again. Prints, for cold and warm page cache (cold: the system dropped its pages; warm: it then read the inputs by
`cat`), wall and CPU seconds and peak private memory (RssAnon), then the ratios that have a goal: wall at most 1.2 x
(cat of all inputs + write of the output), a naive script at least 4 x slower, TIES and SLERP at most 2 x the weighted
sum, an extraction's residual at most 1% above the optimum. Other goals: 0.5 GiB private memory, extraction of rank 64
in 2 minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.formats import private_kib
from sdft.formats.architecture import PARTS, empty_network, parameter_names
from sdft.formats.keys import mapping_for_weight
from sdft.formats.lora_delta import lora_delta
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import DOWN
from sdft.formats.model_checkpoint import open_checkpoint
from sdft.formats.output import atomic_output
from sdft.formats.safetensors_io import TensorInfo, write_tensors
from sdft.models.load import SDXL_BASE

SAMPLED = 5
"""Layers whose residual is compared with the best."""
NAIVE = """
import sys, torch
from safetensors.torch import load_file, save_file
*paths, out = sys.argv[1:]
models = [load_file(path) for path in paths]
weights = [0.6, 0.4] if len(models) == 2 else [1.0, 1.0, -1.0]
save_file({k: sum(m[k].float() * w for m, w in zip(models, weights)).to(models[0][k].dtype) for k in models[0]}, out)
"""
WRITE = """
import os, sys
size, out = int(sys.argv[1]), sys.argv[2]
block = memoryview(os.urandom(2**24))
with open(out, "wb", buffering=0) as file:
    for start in range(0, size, len(block)):
        file.write(block[: size - start])
    os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Usage:
    """Time and memory of a command."""

    wall: float
    cpu: float
    private_gib: float

    def __str__(self) -> str:
        return f"{self.wall:7.1f} {self.cpu:7.1f} {self.private_gib:7.2f}"


def write_random(path: Path, seed: int, scale: float) -> None:
    """A single file in fp16 with SDXL's names, every length times `scale`; near that of seed 0, as fine-tunes are."""
    noise, own = (torch.randn(2**22, generator=torch.Generator().manual_seed(s)) * 0.02 for s in (0, seed))
    noise = (noise + 0.05 * own).half() if seed else noise.half()
    entries = {}
    for part in PARTS:
        network = empty_network(part, SDXL_BASE / part)
        for weight, name in parameter_names(part, network).items():
            place = mapping_for_weight(part, weight.split("/", 1)[1])
            shape = [max(1, int(n * scale)) if n > 16 else n for n in network.get_parameter(name).shape]
            entries[place.single] = TensorInfo("F16", place.single_shape(tuple(shape)))
    starts = {name: 997 * i for i, name in enumerate(entries)}

    def compute(name: str) -> torch.Tensor:
        shape = torch.Size(entries[name].shape)
        block = noise.roll(starts[name])
        return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)

    write_tensors(path, entries, {"format": "pt"}, compute)


def drop_pages(*paths: Path) -> None:
    """Drop files from the page cache; all files, if this process has the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(*command: object, quiet: bool = True) -> Usage:
    """What a command took, its children included."""
    before, begun, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    child = os.posix_spawnp(
        str(command[0]),
        [str(word) for word in command],
        os.environ | {"TQDM_DISABLE": "1"},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)] if quiet else [],
    )
    done = 0
    while not done:
        peak = max(peak, private_kib(child))
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(wall, cpu, peak / 2**20)


Job = tuple[list, list[Path], tuple[str, ...]]
"""A command, the inputs that it reads, and the states of the page cache that it is measured in."""


def jobs_on(a: Path, b: Path, c: Path, out: Path, lora: Path) -> dict[str, Job]:
    """Name of a line -> what is measured."""
    merge = [sys.executable, "-m", "sdft.merging", "overwrite=true", f"out={out}"]
    extract = [sys.executable, "-m", "sdft.merging", "merge=extract", "overwrite=true", f"out={lora}"]
    naive = [sys.executable, "-c", NAIVE]
    write = [sys.executable, "-c", WRITE, a.stat().st_size, out]
    both, once = ("cold", "warm"), ("cold",)
    return {
        "python, imports and --help": ([*merge, "--help"], [], once),
        "cp of one and sync": (["sh", "-c", f"cp {a} {out} && sync {out}"], [a], both),
        "write and fsync": (write, [], once),
        "cat of two": (["cat", a, b], [a, b], both),
        "cat of three": (["cat", a, b, c], [a, b, c], both),
        "weighted sum": ([*merge, f"a={a}", f"b={b}", "alpha=0.4"], [a, b], both),
        "naive weighted sum": ([*naive, a, b, out], [a, b], both),
        "slerp": ([*merge, "merge=slerp", f"a={a}", f"b={b}"], [a, b], once),
        "TIES of two": ([*merge, "merge=ties", f"base={a}", f"models=[{b},{c}]"], [a, b, c], both),
        "extract of rank 64": ([*extract, f"a={a}", f"b={b}", "rank=64"], [a, b], once),
        "add-difference": ([*merge, "merge=add_difference", f"a={a}", f"b={b}", f"c={c}"], [a, b, c], both),
        "naive add-difference": ([*naive, a, b, c, out], [a, b, c], both),
    }


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", type=lambda words: words.split(","))
    arguments = parser.parse_args()
    kept = arguments.folder
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        a, b, c = (Path(folder) / f"{name}.safetensors" for name in "abc")
        for seed, path in enumerate((a, b, c)):
            if not path.exists():
                with atomic_output(path) as written:
                    write_random(written, seed, arguments.scale)
        print(f"three files of {a.stat().st_size / 2**30:.2f} GiB".ljust(40) + "   wall     CPU private", flush=True)
        out, lora = (Path(folder) / f"{name}.safetensors" for name in ("out", "lora"))
        jobs = jobs_on(a, b, c, out, lora)
        if unknown := set(arguments.only or ()) - set(jobs):
            raise SystemExit(f"--only: there is no {', '.join(unknown)}; there are {', '.join(jobs)}")
        walls: dict[tuple[str, str], float] = {}
        for name in arguments.only or jobs:
            command, inputs, caches = jobs[name]
            for cache in caches:
                out.unlink(missing_ok=True)
                drop_pages(*inputs)
                if cache == "warm":
                    run("cat", *inputs)
                took = run(*command)
                walls[name, cache] = took.wall
                print(f"{name}, {cache}".ljust(40), took, flush=True)
        out.unlink(missing_ok=True)
        print_ratios(walls)
        if lora.exists():
            print_residuals(a, b, lora)
            lora.unlink()


def print_ratios(walls: Mapping[tuple[str, str], float]) -> None:
    """The ratios that have a goal, of the lines that were run. walls: (name, cache) -> wall seconds."""
    for cache in ("cold", "warm"):
        times_of = {name: wall for (name, of), wall in walls.items() if of == cache}
        write = walls.get(("write and fsync", "cold"))
        disk = {name: wall + write for name, wall in times_of.items() if write is not None}
        for name, beside, times, goal in (
            ("weighted sum", "cat of two", disk, "at most 1.2 x"),
            ("add-difference", "cat of three", disk, "at most 1.2 x"),
            ("naive weighted sum", "weighted sum", times_of, "at least 4 x"),
            ("naive add-difference", "add-difference", times_of, "at least 4 x"),
            ("slerp", "weighted sum", times_of, "at most 2 x"),
            ("TIES of two", "weighted sum", times_of, "at most 2 x"),
            ("TIES of two", "add-difference", times_of, "none; it has as many inputs"),
        ):
            if name in times_of and beside in times:
                beside_it = f"({beside} + write and fsync)" if times is disk else beside
                print(f"{name}, {cache}: {times_of[name] / times[beside]:.2f} x {beside_it}, goal {goal}")


def print_residuals(a: Path, b: Path, lora: Path) -> None:
    """Norm of the residual of a LoRA of a - b in some layers, relative to that of the best factors of the rank."""
    layers = read_lora(lora, str(lora)).layers
    names = sorted(name for name in layers if name.startswith("unet/"))
    with open_checkpoint("a", a).opened() as read_a, open_checkpoint("b", b).opened() as read_b:
        for name in names[:: max(1, len(names) // SAMPLED)][:SAMPLED]:
            change = (read_a(f"{name}.weight").float() - read_b(f"{name}.weight").float()).flatten(1)
            rank = len(layers[name].tensors[DOWN])
            best = torch.linalg.svdvals(change)[rank:].norm()
            missed = (change - lora_delta(layers[name])).norm()
            print(f"{name}, {list(change.shape)}, rank {rank}: {missed / best - 1:.3%} above the best, goal 1%")


if __name__ == "__main__":
    main()
