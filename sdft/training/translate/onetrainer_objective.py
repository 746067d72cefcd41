"""Options of OneTrainer about what is learned: predictions, losses, noise, timesteps, masks."""

from __future__ import annotations

from sdft.training.translate.command_line import Command
from sdft.training.translate.rules import Given, Rules


def objective(given: Given, command: Command) -> None:
    """Zero terminal SNR forces v-prediction there."""
    zero_snr = given.flag("rescale_noise_scheduler_to_zero_terminal_snr")
    is_v = zero_snr or given.flag("force_v_prediction")
    keys = [key for key in ("rescale_noise_scheduler_to_zero_terminal_snr", "force_v_prediction") if given.flag(key)]
    command.set("objective", "v_zero_snr" if zero_snr else "v" if is_v else "epsilon", *keys)
    if not is_v and not given.flag("force_epsilon_prediction"):
        command.differ("the prediction is that of the files there; for a v-prediction model, set objective=v")


def weighting(given: Given, command: Command) -> None:
    name, strength = given.text("loss_weight_fn", "CONSTANT"), given.number("loss_weight_strength", 5.0)
    is_v = command.overrides["objective"] != "epsilon"
    if name == "MIN_SNR_GAMMA":
        command.set("objective/weighting", "min_snr", "loss_weight_fn")
        command.set("objective.weighting.gamma", strength, "loss_weight_strength")
        return
    if name == "P2":
        command.set("objective/weighting", "p2", "loss_weight_fn")
        command.set("objective.weighting.gamma", strength, "loss_weight_strength")
        command.set("objective.weighting.k", 1)
        if is_v:
            command.differ("loss_weight_fn=P2: of the error in v there, of that in eps here")
        return
    if name == "DEBIASED_ESTIMATION" and not is_v:
        command.set("objective/weighting", "debiased", "loss_weight_fn")
        return
    command.set("objective/weighting", "uniform", *(["loss_weight_fn"] if name == "CONSTANT" else []))
    if name != "CONSTANT":
        command.lack(
            "loss_weight_fn",
            "not defined for this prediction here; choose one of objective/weighting=min_snr, p2, curve",
            name,
        )


def loss(given: Given, command: Command) -> None:
    """Sums of four losses there, one here."""
    strengths = {
        name: given.number(f"{name}_strength", 1.0 if name == "mse" else 0.0)
        for name in ("mse", "mae", "log_cosh", "huber")
    }
    chosen = [name for name, strength in strengths.items() if strength]
    if "huber" in chosen and "mse" not in chosen:
        command.set("objective/loss", "huber", "huber_strength", "mse_strength")
        command.set("objective.loss.c", given.number("huber_delta", 1.0), "huber_delta")
        command.set("objective.loss.schedule", "constant")
        command.differ(
            "huber_strength: Huber's loss there, half as large; objective/loss=huber is the pseudo-Huber loss"
        )
        chosen.remove("huber")
    for name in chosen:
        if name != "mse":
            command.lack(
                f"{name}_strength", "one loss at a time here: objective/loss=l2, huber or smooth_l1", strengths[name]
            )
    if strengths["mse"] not in (0, 1):
        command.differ(f"mse_strength={strengths['mse']}: scale the learning rate instead", "mse_strength")


def noise(given: Given, command: Command) -> None:
    if offset := given.number("offset_noise_weight", 0):
        command.set("objective/noise", "offset", "offset_noise_weight")
        command.set("objective.noise.strength", offset, "offset_noise_weight")
        if given.flag("generalized_offset_noise"):
            command.lack("generalized_offset_noise", "the offset is the same at all timesteps here")
    if gamma := given.number("perturbation_noise_weight", 0):
        command.set("objective.input_perturbation", gamma, "perturbation_noise_weight")
        command.differ(
            "perturbation_noise_weight: constant, and in the target too, there; objective.input_perturbation "
            "is in the input only, and falls to 0 over the run"
        )


def timesteps(given: Given, command: Command) -> None:
    name, bias, weight = (
        given.text("timestep_distribution", "UNIFORM"),
        given.number("noising_bias", 0.0),
        given.number("noising_weight", 0.0),
    )
    low, high = given.number("min_noising_strength", 0.0), given.number("max_noising_strength", 1.0)
    keys = ("timestep_distribution", "noising_bias", "noising_weight")
    if name == "LOGIT_NORMAL":
        command.set("objective/timesteps", "logit_normal", *keys)
        command.set("objective.timesteps.mean", bias, *keys)
        command.set("objective.timesteps.std", weight + 1, *keys)
    elif name != "UNIFORM" and not (name in ("SIGMOID", "INVERTED_PARABOLA") and weight == 0):
        command.lack(
            "timestep_distribution",
            "choose objective/timesteps=logit_normal or cubic, or weight the timesteps "
            f"by objective/weighting=curve (noising_bias={bias}, noising_weight={weight})",
            name,
        )
        command.cited |= set(keys)
    if (low, high) != (0, 1):
        if name == "LOGIT_NORMAL":
            command.lack(
                "min_noising_strength, max_noising_strength",
                "objective/timesteps=logit_normal covers the whole schedule",
                [low, high],
            )
            command.cited |= {"min_noising_strength", "max_noising_strength"}
        else:
            command.set("objective.timesteps.low", low, "min_noising_strength")
            command.set("objective.timesteps.high", high, "max_noising_strength")


def masks(given: Given, command: Command) -> None:
    if not given.flag("masked_training"):
        return
    command.set("data.masks", True, "masked_training")
    command.set("objective.outside", given.number("unmasked_weight", 0.1), "unmasked_weight")
    command.set("objective.normalise_mask", given.flag("normalize_masked_area_loss"), "normalize_masked_area_loss")
    command.differ(
        "masked_training: masks are cat-masklabel.png there, cat.mask.png here: rename them", "masked_training"
    )
    if given.number("unmasked_probability", 0.1):
        command.lack(
            "unmasked_probability",
            "masks count at every visit here; raise objective.outside instead",
            given.number("unmasked_probability", 0.1),
        )
    if weight := given.number("masked_prior_preservation_weight", 0):
        command.set("objective/prior", "outside", "masked_prior_preservation_weight")
        command.set("objective.prior.weight", weight, "masked_prior_preservation_weight")


OBJECTIVE_RULES: Rules = {
    objective: ("rescale_noise_scheduler_to_zero_terminal_snr", "force_v_prediction", "force_epsilon_prediction"),
    weighting: ("loss_weight_fn", "loss_weight_strength"),
    loss: ("mse_strength", "mae_strength", "log_cosh_strength", "huber_strength", "huber_delta"),
    noise: ("offset_noise_weight", "generalized_offset_noise", "perturbation_noise_weight"),
    timesteps: (
        "timestep_distribution",
        "noising_bias",
        "noising_weight",
        "min_noising_strength",
        "max_noising_strength",
    ),
    masks: (
        "masked_training",
        "unmasked_weight",
        "normalize_masked_area_loss",
        "unmasked_probability",
        "masked_prior_preservation_weight",
    ),
}
