"""Data loading: decoding compared with a Pillow loop, the latent cache with reading the same bytes, building the cache
with the encoder alone, and start time and memory by size of the data set. Prints ratios. All files are written to
a temporary folder (in TMPDIR), which is removed at the end.

    python -m benchmarks.data [pictures=5000] [side=1024] [cached=1000] [built=16] [samples=100000]
"""

from __future__ import annotations

import gc
import io
import itertools
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from sdft.data.cache import Cache
from sdft.data.datamodule import Images, folder
from sdft.data.encoding import prepared
from sdft.data.order import NUM_PREFETCHED
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Shards

OPTIONS = {"pictures": 5000, "side": 1024, "cached": 1000, "built": 16, "samples": 100_000}
NUM_ROUNDS = 7
PARTS = {"moments": (8, 128, 128), "states": (77 * 2048 + 1280,)}
"""The cache entry of one captioned image of 1024 x 1024 for SDXL: mean and log variance, and the text embeddings."""
DIFFERENT = 100
PER_SHARD = 1000
BATCH = 8


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call."""
    begun = clock()
    work()
    return clock() - begun


def write_pictures(root: Path, num: int, side: int) -> None:
    """JPEGs of noise over a ramp, about as many bytes as photographs have: DIFFERENT images, and all files differ."""
    g = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[:, None, None]
    drawn = []
    for _ in range(min(num, DIFFERENT)):
        coarse = Image.fromarray(g.integers(0, 56, (side // 4, side // 4, 3), dtype=np.uint8)).resize((side, side))
        file = io.BytesIO()
        Image.fromarray((ramp + np.asarray(coarse)).astype(np.uint8)).save(file, "JPEG", quality=92)
        drawn.append(file.getvalue())
    for i in range(num):
        content = drawn[i % len(drawn)]
        comment = b"\xff\xfe" + (10).to_bytes(2, "big") + f"{i:08d}".encode()
        (root / f"{i:05d}.jpg").write_bytes(content[:2] + comment + content[2:])
        (root / f"{i:05d}.txt").write_text("a picture")


def decoding(root: Path, num: int) -> None:
    """Folder and shards against a loop that opens, converts and copies: seconds of one core, 50 pictures in turn."""
    stored = Folder(str(root), "all")
    shards = write_shards(stored, root.parent / "shards", per_shard=1000)
    sharded = Shards("::".join(map(str, shards)), "all")
    files = [root / key for key in stored.keys]
    ways: list[Callable[[int], object]] = [
        lambda i: np.asarray(Image.open(files[i]).convert("RGB")),
        lambda i: stored[i].image_HWC,
        lambda i: sharded[i].image_HWC,
    ]
    spent = [0.0, 0.0, 0.0]
    for first in range(0, num, 50):
        places = range(first, min(first + 50, num))
        for way, work in enumerate(ways):
            spent[way] += seconds(lambda work=work, places=places: [work(i) for i in places], time.process_time)
    loop, of_folder, of_shards = spent
    rates = f"Pillow {num / loop:.1f}, folder {num / of_folder:.1f}, shards {num / of_shards:.1f}"
    print(f"{num} pictures decoded, a second of one core: {rates}")
    print(f"  as a fraction of the Pillow loop: folder {loop / of_folder:.2f}, shards {loop / of_shards:.2f}")


def workers(root: Path) -> None:
    """Training batches of decoded and cropped pictures with 0 workers, and with one for each core."""
    source = Folder(str(root), "all")
    rates = []
    for num in (0, *range(1, len(os.sched_getaffinity(0)) + 1)):
        data = Images(source, source, 4, 512, cache="off", num_workers=num)
        steps = max(8, len(source.keys) // 4)
        data.trainer = SimpleNamespace(max_steps=steps, accumulate_grad_batches=1, global_rank=0, world_size=1)
        batches = iter(data.train_dataloader())
        next(batches)  # workers have started
        rates.append(4 * (steps - 1) / seconds(lambda batches=batches: list(batches)))
    told = ", ".join(f"{num} workers {rate:.0f}" for num, rate in enumerate(rates))
    ratio = rates[-1] / rates[1]
    print(f"pictures a second, decoded and cropped to 512 x 512: {told}; the last is {ratio:.2f} of one worker")


def reading(place: Path, num: int) -> None:
    """Samples of SDXL's size in random order, compared with reading the same files sequentially in pieces of that size.

    Warm: all files are in the page cache. Cold: they were dropped from it. The first read of an entry verifies its
    checksum.
    """
    written = Cache(place)
    parts = {name: torch.rand(shape) for name, shape in PARTS.items()}
    for i in range(num):
        for name, tensor in parts.items():
            written.put(f"{i:08x}.{name}", tensor + i)
    written.flush()
    files = sorted(place.glob("*.safetensors"))
    order = np.random.default_rng(1).permutation(num).tolist()
    sizes = [tensor.nbytes for tensor in parts.values()]

    def in_sequence() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                for size in itertools.cycle(sizes):
                    piece = file.read(size)
                    if not piece:
                        break

    def in_a_run(cache: Cache) -> None:
        """Batches are prefetched as in a run, without the training steps in between."""
        batches = [order[first : first + BATCH] for first in range(0, num, BATCH)]
        addresses = [[f"{i:08x}.{name}" for i in batch for name in parts] for batch in batches]
        for batch in addresses[:NUM_PREFETCHED]:
            cache.prefetch(batch)
        for batch, following in zip(addresses, [*addresses[NUM_PREFETCHED:], *[[]] * NUM_PREFETCHED], strict=True):
            cache.prefetch(following)
            for address in batch:
                _ = cache[address]

    def times(before: Callable[[], object], opened: Callable[[], Cache]) -> tuple[float, float]:
        gc.collect()
        cache = opened()
        before()
        plain = seconds(in_sequence)
        before()
        return plain, seconds(lambda: in_a_run(cache))

    read = Cache(place)
    in_a_run(read)
    ways = {
        "again, warm": (lambda: None, lambda: read),
        "first, warm": (lambda: None, lambda: Cache(place)),
        "first, cold": (lambda: forget(files), lambda: Cache(place)),
    }
    for state, (before, opened) in ways.items():
        pairs = [times(before, opened) for _ in range(NUM_ROUNDS)]
        ours = statistics.median(run for _, run in pairs)
        ratio = statistics.median(plain / run for plain, run in pairs)
        gigabytes = num * sum(sizes) / 1e9
        print(
            f"cache, {state}: {num / ours:.0f} samples a second, {gigabytes / ours:.1f} GB/s, {ratio:.2f} of "
            f"reading the same bytes in sequence (goal: 0.8)"
        )


def forget(files: Sequence[Path]) -> None:
    """Drop some files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def building(root: Path, num: int) -> None:
    """Filling the cache, compared with the encoder alone on pixels in memory: nano's VAE at 512 x 512."""
    from sdft.models.load import pretrained

    model = pretrained("nano")
    some = root.parent / "some"
    some.mkdir()
    for file in [f for i in range(num) for f in (root / f"{i:05d}.jpg", root / f"{i:05d}.txt")]:
        (some / file.name).symlink_to(file)
    data = folder(str(some), batch_size=4, size=512, cache="disk", cache_dir=str(root.parent / "built"))
    ready = [
        group
        for pictures in (data.train_set, data.validation_set)
        for _, group in prepared(pictures, list(pictures.cacheable_variants()), 4)
    ]
    alone = seconds(lambda: [model.encode_moments(pixels) for pixels in ready])
    device = torch.device("cpu")
    whole = seconds(lambda: data.encode_once(model.encode_moments, device, batch_size=4, vae=model.vae))
    again = seconds(lambda: [model.encode_moments(pixels) for pixels in ready])
    fraction = (alone + again) / 2 / whole
    print(f"cache build: {num / whole:.2f} pictures a second, {fraction:.2f} of the encoder alone (goal: 0.95)")


START = """
import re, sys, time
begun = time.monotonic()
from sdft.data.cache import Cache
from sdft.data.datamodule import shards
imported = time.monotonic()
data = shards(sys.argv[1], batch_size=8, size=64, cache="off", cache_dir=sys.argv[2])
kept = Cache(sys.argv[2])
started = time.monotonic()
for batch in data.val_dataloader():
    break
for index in range(64):
    data.train_set[index, 0]
    kept[f"{index}.moments"]
# Not ru_maxrss, which begins with the peak of whoever started this process.
print(started - imported, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def starting(place: Path, num: int) -> None:
    """Seconds and peak memory of a first and a second start: shards of small pictures, and a cache of as many."""
    place.mkdir()
    for first in range(0, num, PER_SHARD):
        with tarfile.open(place / f"{first // PER_SHARD}.tar", "w") as tar:
            for i in range(first, min(first + PER_SHARD, num)):
                file = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), i % 251, np.uint8)).save(file, "PNG")
                for name, content in ((f"{i:07d}.png", file.getvalue()), (f"{i:07d}.txt", b"a picture %d" % i)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    kept = Cache(place, shard_bytes=PER_SHARD * len(PARTS) * 4)
    for i in range(num):
        for name in PARTS:
            kept.put(f"{i}.{name}", torch.tensor([float(i)]))
    kept.flush()
    time.sleep(3)  # a file just written has no stamp yet
    shards = str(place / f"{{0..{(num - 1) // PER_SHARD}}}.tar")
    command = [sys.executable, "-c", START, shards, str(place)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    starts = [f"{float(spent):.1f} s, {float(peak):.0f} MiB" for spent, peak in runs]
    print(f"start with {num} samples: first {starts[0]}; second {starts[1]}")


def main() -> None:
    """Every comparison."""
    options = OPTIONS | {k: int(v) for k, v in (word.split("=") for word in sys.argv[1:])}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        root = Path(place) / "in"
        root.mkdir()
        reading(Path(place) / "cache", options["cached"])
        write_pictures(root, options["pictures"], options["side"])
        building(root, options["built"])
        decoding(root, options["pictures"])
        workers(root)
        for num in (1000, options["samples"]):
            starting(Path(place) / f"of {num}", num)


if __name__ == "__main__":
    main()
