"""Two processes compared with one: step times, the share of communication, and the bytes sent.

    python -m benchmarks.scale

nano, full and LoRA, on the CPU with gloo: one thread per process, the same global batch. The share of communication is
the additional time of a step compared with two independent processes that run at the same time, each with half of the
batch. Bytes are those counted by the loopback device, in a separate network namespace if that is allowed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_STEPS, WARM_UP, BATCH = 12, 3, 8
CASES = (("one", 1, ""), ("two, apart", 2, ""), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp"))


def rank_of(case: tuple[str, int, str], tuning: str, rank: int, port: int, found: Any) -> None:
    """One process: trains, and returns median seconds and bytes of a step, and the number of trainable parameters."""
    import lightning as L
    import torch

    from sdft.config.command import build, compose
    from sdft.module import Finetuning
    from sdft.tuning.parameters import trainable_parameters

    _, num_processes, strategy = case
    torch.set_num_threads(1)
    words = ["experiment=dreamy_style", f"tuning={tuning}", "logger=csv", "trainer.precision=32-true"]
    words += [f"data.batch_size={BATCH // num_processes}", f"trainer.max_steps={NUM_STEPS}", "data.caption_dropout=0.0"]
    words += ["trainer.accelerator=cpu", "trainer.progress_bar=false", "trainer.validate_every=1000"]
    if strategy:
        words += [f"strategy={strategy}", f"trainer.devices={num_processes}"]
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.bytes: list[int] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.began, self.sent = time.perf_counter(), bytes_sent()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            self.bytes.append(bytes_sent() - self.sent)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose("train", [*words, f"run_dir={folder}"])
        data, method, objective = (build(cfg[name]) for name in ("data", "tuning", "objective"))
        trainer = build(cfg.trainer, callbacks=[build(cfg.callbacks.ema), clock])
        module = Finetuning(build(cfg.model), method, objective, build(cfg.optimizer), build(cfg.lr_schedule), 0)
        num_trainable = sum(p.numel() for _, p in trainable_parameters(module.model))
        num_unet = sum(p.numel() for p in module.model.unet.parameters())
        trainer.fit(module, data)
    values = {"seconds": statistics.median(clock.seconds[WARM_UP:]), "bytes": statistics.median(clock.bytes[WARM_UP:])}
    found.put({**values, "trainable": num_trainable, "unet": num_unet})


def bytes_sent() -> int:
    """Bytes sent over the loopback device, by all processes that use it."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure(case: tuple[str, int, str], tuning: str) -> dict[str, float]:
    """The slowest rank of a case."""
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = spawn.Queue()
    ranks = [spawn.Process(target=rank_of, args=(case, tuning, rank, port, found)) for rank in range(case[1])]
    for process in ranks:
        process.start()
    measured = [found.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    return max(measured, key=lambda rank: rank["seconds"])


def main() -> None:
    """The table."""
    if os.environ.get("IN_OWN_NETWORK") is None and own_network_works():
        command = f"ip link set lo up; exec {sys.executable} -m benchmarks.scale"
        environment = {**os.environ, "IN_OWN_NETWORK": "yes"}
        raise SystemExit(subprocess.run(["unshare", "--net", "sh", "-c", command], env=environment).returncode)
    print(f"nano, global batch {BATCH}, fp32, median of {NUM_STEPS - WARM_UP} steps")
    print("| tuning | processes | step ms | over one | communication | MB per step | bytes per trained / UNet weight |")
    print("|---|---|---|---|---|---|---|")
    for tuning in ("full", "lora_unet"):
        seconds: dict[str, float] = {}
        for case in CASES:
            name, ours = case[0], measure(case, tuning)
            seconds[name] = ours["seconds"]
            share = 1 - seconds["two, apart"] / seconds[name] if case[2] else None
            sent = f"{ours['bytes'] / 1e6:.1f}" if case[2] else ""
            each = f"{ours['bytes'] / ours['trainable']:.1f} / {ours['bytes'] / ours['unet']:.1f}" if case[2] else ""
            print(
                f"| {tuning} | {name} | {1e3 * seconds[name]:.0f} | {seconds[name] / seconds['one']:.2f} | "
                f"{'' if share is None else f'{share:.0%}'} | {sent} | {each} |",
                flush=True,
            )


def own_network_works() -> bool:
    """Whether this user may create a network namespace."""
    try:
        return subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
