"""Runs whose right ending is known: are they stopped, and is the right step chosen?

    python -m benchmarks.planted [sound overfit forget] [--seeds 10] [--first 0] [--folder DIR]

- sound: the dreamy style on nano. Right: it is not stopped before it has 0.9 of the best style gain that it would
  still have had, and what is chosen has 0.9 of the best of all.
- overfit: four pictures, for long. Right: it is stopped before its end, and what is chosen does not copy them.
- forget: a rate that is too high. Right: it is stopped before its end, and what is chosen is within the limits, or
  nothing is.

Runs are measured twelve times and not stopped; the rule is then asked after each measurement. Two runs at a time, three
minutes each on two cores; runs that are in the folder already are not repeated. The rules were chosen on seeds 0 to 39
of the sound runs and 0 to 9 of the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sdft.choosing.decide import Decision
from sdft.evaluation.stopping import Measurement, StoppingRule
from sdft.training.callbacks.watch import read_measurements

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "sound": ["trainer.max_steps=240"],
    "overfit": ["data.train.num_scenes=4", "trainer.max_steps=480", "lr_schedule=constant"],
    # At 13 times the rate; the guard would end it when a gradient diverges.
    "forget": ["trainer.max_steps=120", "base_lr=2e-2", "lr_schedule=constant", "callbacks.guard.divergence=1e9"],
}
COMMON = [
    "experiment=dreamy_style", "callbacks=watch", "callbacks.watch.every=0.0834", "data.batch_size=4",
    "sampler.steps=10", "logger=csv", "trainer.progress_bar=false", "trainer.validate_every=1000",
    "~callbacks.previews", "~callbacks.page", "verdict.num_images=4", "callbacks.last.every=1000",
]  # fmt: skip


def train(kind: str, seed: int, folder: Path) -> list[Measurement]:
    """The measurements of a run; of one that the guard ended, those before."""
    file = folder / "watch" / "measurements.jsonl"
    if not (folder / "summary.json").is_file():
        words = [*COMMON, *KINDS[kind], f"seed={seed}", f"run_dir={folder}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    return read_measurements(file)


def judged(kind: str, history: list[Measurement]) -> tuple[bool, str]:
    """Whether both decisions are right, and what they were."""
    rule, base, last = StoppingRule(), history[0], history[-1]
    stops = [(one, rule(history[: i + 1])) for i, one in enumerate(history[:-1])]
    stop, reason = next(((one, why) for one, why in stops if why), (None, "not stopped"))
    choice = Decision(base, history[1:], rule.limits).choice()
    kept = choice.recommended
    gains = [one.means["style_gain"] for one in history]
    if kind == "sound":
        end = last if stop is None else stop
        still = max(one.means["style_gain"] for one in history if one.step >= end.step)
        right = end.means["style_gain"] >= 0.9 * still
        right = right and kept is not None and kept.means["style_gain"] >= 0.9 * max(gains)
    else:
        sound = kept is None or not rule.limits.passed(kept, base)
        right = stop is not None and sound and (kept is None or kept.step < last.step)
    at = "end" if stop is None else f"step {stop.step}"
    chosen = "none" if kept is None else f"step {kept.step}"
    return right, f"{at} of {last.step}, {chosen} chosen; {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="planted_"))
    with ThreadPoolExecutor(2) as pool:
        for kind in arguments.kinds:
            seeds = range(arguments.first, arguments.first + arguments.seeds)
            folders = [folder / f"{kind}_{seed}" for seed in seeds]
            runs = list(pool.map(train, [kind] * len(folders), seeds, folders))
            found = [judged(kind, history) for history in runs]
            for seed, (right, what) in zip(seeds, found, strict=True):
                print(f"{kind:8} {seed:2} {'right' if right else 'WRONG'}: {what}", flush=True)
            print(f"{kind:8} right in {sum(right for right, _ in found)} of {len(found)}", flush=True)


if __name__ == "__main__":
    main()
