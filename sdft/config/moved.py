"""Configs of earlier versions: where the classes that they name are today."""

from __future__ import annotations

from typing import Any

MOVED = {
    "sdft.callbacks.exports": "sdft.training.callbacks.export",
    "sdft.callbacks.guards": "sdft.training.callbacks.guard",
    "sdft.callbacks.preempt": "sdft.training.callbacks.preemption",
    "sdft.callbacks": "sdft.training.callbacks",
    "sdft.evaluation.metrics.likeness": "sdft.evaluation.metrics.similarity",
    "sdft.evaluation.verdict.AutoencoderVerdict": "sdft.evaluation.after_training.AutoencoderEvaluation",
    "sdft.evaluation.verdict.JudgeVerdict": "sdft.evaluation.after_training.JudgeEvaluation",
    "sdft.evaluation.verdict.StyleVerdict": "sdft.evaluation.after_training.StyleEvaluation",
    "sdft.merging.sparse": "sdft.merging.sparsify",
    "sdft.merging.way.way": "sdft.merging.interpolation.interpolate",
    "sdft.objective.Debiased": "sdft.objective.weighting.Debiased",
    "sdft.objective.Denoising": "sdft.objective.denoising.Denoising",
    "sdft.objective.LogitNormalTimesteps": "sdft.objective.timesteps.LogitNormalTimesteps",
    "sdft.objective.MinSNR": "sdft.objective.weighting.MinSNR",
    "sdft.objective.Uniform": "sdft.objective.weighting.Uniform",
    "sdft.objective.UniformTimesteps": "sdft.objective.timesteps.UniformTimesteps",
    "sdft.optimizer.adamw": "sdft.optimizers.optimizers.adamw",
    "sdft.optimizer": "sdft.optimizers.schedules",
    "sdft.preflight": "sdft.planning.preflight",
    "sdft.sampling.Sampler": "sdft.sampling.samplers.Sampler",
    "sdft.strategies": "sdft.distributed.strategies",
    "sdft.trainer.trainer": "sdft.training.trainer.trainer",
    "sdft.trainer": "sdft.training.checkpoints",
    "sdft.tuning.Adapter": "sdft.tuning.adapter.Adapter",
    "sdft.tuning.Full": "sdft.tuning.full.Full",
}
"""Module or class of version 0.1.0 -> its name today. The longest match counts."""


def current_name(target: str) -> str:
    """The name today of a `_target_`."""
    for old in sorted(MOVED, key=len, reverse=True):
        if target == old or target.startswith(f"{old}."):
            return MOVED[old] + target.removeprefix(old)
    return target


def with_todays_noise(node: dict[Any, Any]) -> dict[Any, Any]:
    """A node with the noise of an objective as an object of its own; it was a number, `offset_noise`, before."""
    strength = node.get("offset_noise")
    if node.get("_target_") != "sdft.objective.denoising.Denoising" or not isinstance(strength, int | float):
        return node
    node = {key: value for key, value in node.items() if key != "offset_noise"}
    offset = {"_target_": "sdft.objective.noise.Offset", "strength": strength, "random": False, "adaptive": 0.0}
    return node | {"noise": offset} if strength else node


def rename_targets(node: Any, key: object = None) -> Any:
    """A copy of a tree with today's name of every `_target_`."""
    if isinstance(node, dict):
        return with_todays_noise({key: rename_targets(value, key) for key, value in node.items()})
    if isinstance(node, list):
        return [rename_targets(value) for value in node]
    return current_name(node) if key == "_target_" and isinstance(node, str) else node
