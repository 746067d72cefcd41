"""Compare what models draw of the same words: `python eval.py subjects='{base: nano, mine: RUN_FOLDER}'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sdft.config import build, verb
from sdft.evaluation.adherence import Judge, load_judge
from sdft.evaluation.report import Row, write_grid, write_images, write_report, write_results
from sdft.evaluation.subjects import Comparison, Models, Subject, read_subjects
from sdft.models.load import NANO
from sdft.sampling import generate


@verb("eval")
def main(cfg: DictConfig) -> None:
    """One comparison, from config to pictures, `results.csv` and `report.html`."""
    cfg.run_dir = HydraConfig.get().runtime.output_dir
    comparison = build(cfg)
    # The cheap parts first: a wrong path is told before any weights are read.
    subjects = read_subjects(comparison.subjects)
    judge = find_judge(comparison.judge)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = Models(comparison.model, cfg.model.get("weights"), device)
    rows = []
    for subject in subjects:
        rows.append(draw(subject, models, comparison, judge))
        write_images(comparison.run_dir, rows[-1])
    write_grid(comparison.run_dir / "grid.png", comparison, rows)
    write_results(comparison.run_dir / "results.csv", comparison, rows)
    write_report(comparison.run_dir / "report.html", comparison, rows)
    tell(rows, comparison.run_dir)


def find_judge(judge: str | None) -> Judge | None:
    """The CLIP that scores pictures; `nano` is the shipped one."""
    return None if judge is None else load_judge(str(NANO / "clip") if judge == "nano" else judge)


def draw(subject: Subject, models: Models, comparison: Comparison, judge: Judge | None) -> Row:
    """One subject's answers to all questions."""
    prompts = [question.prompt for question in comparison.questions]
    seeds = [question.seed for question in comparison.questions]
    with models.open(subject) as model:
        images = generate(
            model,
            prompts,
            seeds,
            comparison.sampler,
            size_hw=(comparison.size, comparison.size),
            precision="bf16" if model.device.type == "cuda" else "fp32",
            progress=subject.name,
        )
    return Row(subject, images, judge.similarity(images, prompts).tolist() if judge else None)


def tell(rows: Sequence[Row], run_dir: Path) -> None:
    """What came out and where it lies."""
    width = max(len(row.subject.name) for row in rows)
    for row in rows:
        score = "" if row.mean_score is None else f"CLIP score {row.mean_score:.3f}   "
        print(f"{row.subject.name:{width}}   {score}{row.subject.kind} {row.subject.source}")
    for name in ("report.html", "grid.png", "results.csv", "images"):
        print(f"  {name.partition('.')[0]:8} {run_dir / name}")


if __name__ == "__main__":
    main()
