"""What reading costs: decoding beside a plain Pillow loop, the latent cache beside reading the same bytes, the build of
the cache beside the encoder alone, and memory as a set grows. Prints ratios.

    python -m benchmarks.data [pictures=200] [side=1024]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdft.data.cache import Cache
from sdft.data.datamodule import folder
from sdft.data.encoding import prepared
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Shards

NUM_ROUNDS = 3
ENTRY = (8, 128, 128)
"""Mean and log variance of a picture of 1024 x 1024."""


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write_pictures(root: Path, num: int, side: int) -> None:
    """JPEGs of noise over a ramp: about as many bytes as photographs have."""
    g = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[:, None, None]
    for i in range(num):
        coarse = Image.fromarray(g.integers(0, 56, (side // 4, side // 4, 3), dtype=np.uint8)).resize((side, side))
        Image.fromarray((ramp + np.asarray(coarse)).astype(np.uint8)).save(root / f"{i:05d}.jpg", quality=92)
        (root / f"{i:05d}.txt").write_text("a picture")


def decoding(root: Path, num: int) -> None:
    """Folder and shards against a loop that opens, converts and copies; one core each."""
    stored = Folder(str(root), "all")
    shards = write_shards(stored, root.parent / "shards", per_shard=max(1, num // 4))
    sharded = Shards("::".join(map(str, shards)), "all")
    plain = [
        lambda: [np.asarray(Image.open(file).convert("RGB")) for file in sorted(root.glob("*.jpg"))],
        lambda: [stored[i].image_HWC for i in range(num)],
        lambda: [sharded[i].image_HWC for i in range(num)],
    ]
    rounds = [[seconds(work) for work in plain] for _ in range(NUM_ROUNDS)]
    loop, of_folder, of_shards = (statistics.median(times) for times in zip(*rounds, strict=True))
    rates = f"Pillow {num / loop:.1f}, folder {num / of_folder:.1f}, shards {num / of_shards:.1f}"
    print(f"decoded a second, one core: {rates}")
    print(f"  as a fraction of the Pillow loop: folder {loop / of_folder:.2f}, shards {loop / of_shards:.2f}")


def reading(folder_: Path, num: int) -> None:
    """Entries of SDXL's size in random order, first checked and then again, against the files read from end to end."""
    cache = Cache(folder_)
    addresses = [f"{i:08x}" for i in range(num)]
    for address in addresses:
        cache.put(address, torch.rand(ENTRY))
    cache.flush()
    order = [addresses[i] for i in np.random.default_rng(1).permutation(num)]
    files = sorted(folder_.glob("*.safetensors"))
    fractions = []
    for _ in range(NUM_ROUNDS):
        opened = Cache(folder_)
        plain = seconds(lambda: [file.read_bytes() for file in files])
        checked = seconds(lambda cache=opened: [cache[address].sum() for address in order])
        again = seconds(lambda cache=opened: [cache[address].sum() for address in order])
        fractions.append((plain / checked, plain / again, num / checked, num / again))
    first, later, rate, later_rate = (statistics.median(column) for column in zip(*fractions, strict=True))
    print(f"cache, samples a second: first reading {rate:.0f}, later {later_rate:.0f}")
    print(f"  as a fraction of reading the same bytes in sequence: first {first:.2f}, later {later:.2f} (goal: 0.8)")


def building(root: Path, num: int) -> None:
    """Filling the cache against the encoder alone on pixels that are already there."""
    from sdft.models.load import pretrained

    model = pretrained("nano")
    data = folder(str(root), batch_size=4, size=512, cache="disk", cache_dir=str(root.parent / "built"), held_out=0.0)
    ready = list(prepared(data.pictures, data.pictures.cacheable_variants(), 4))
    alone = seconds(lambda: [model.encode_moments(pixels) for _, pixels in ready])
    device = torch.device("cpu")
    whole = seconds(lambda: data.encode_once(model.encode_moments, device, batch_size=4, vae=model.vae))
    fraction = alone * num / (num - 1) / whole  # one picture is held out, and encoded as well
    print(f"cache build: {num / whole:.1f} pictures a second, {fraction:.2f} of the encoder alone (goal: 0.95)")


def memory(num: int) -> float:
    """Peak MiB of a process that indexes `num` synthetic samples and reads a few batches."""
    script = f"""
import numpy as np, resource
from sdft.data.dataset import Pictures, RunOrder, Sample
class Synthetic:
    keys = [f"shard/{{i:08d}}" for i in range({num})]
    def __getitem__(self, i): return Sample(self.keys[i], np.zeros((64, 64, 3), np.uint8), "a picture")
pictures = Pictures(Synthetic(), (64, 64), 0)
for items in RunOrder({num}, 8, 0, 0, 4):
    for item in items: pictures[item]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Every comparison."""
    options = {"pictures": 200, "side": 1024} | {k: int(v) for k, v in (word.split("=") for word in sys.argv[1:])}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "in"
        root.mkdir()
        write_pictures(root, options["pictures"], options["side"])
        decoding(root, options["pictures"])
        reading(Path(place) / "cache", options["pictures"])
        building(root, options["pictures"])
    small, large = memory(1000), memory(100_000)
    print(f"peak memory: {small:.0f} MiB with 1,000 samples, {large:.0f} MiB with 100,000")


if __name__ == "__main__":
    main()
