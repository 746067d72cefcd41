"""Options of kohya's sd-scripts about what is learned: predictions, losses, noise, timesteps."""

from __future__ import annotations

from sdft.training.translate.command_line import Command
from sdft.training.translate.rules import Given, Rules


def objective(given: Given, command: Command) -> None:
    """What the model predicts, and on which schedule."""
    is_v, zero_snr = given.flag("v_parameterization"), given.flag("zero_terminal_snr")
    command.set("objective", "v_zero_snr" if is_v and zero_snr else "v" if is_v else "epsilon")
    command.cited |= {"v_parameterization", "zero_terminal_snr"} if is_v else set()
    if zero_snr and not is_v:
        command.lack(
            "zero_terminal_snr", "epsilon is 0 / 0 at zero signal; objective=v_zero_snr needs a v-prediction model"
        )


def weighting(given: Given, command: Command) -> None:
    """kohya multiplies its weightings; sdft has one. Its default is uniform, ours min_snr."""
    gamma, is_v = given.number("min_snr_gamma"), given.flag("v_parameterization")
    debiased, like_noise = given.flag("debiased_estimation_loss"), given.flag("scale_v_pred_loss_like_noise_pred")
    product = [
        name
        for name, on in (
            ("min_snr_gamma", gamma),
            ("debiased_estimation_loss", debiased),
            ("scale_v_pred_loss_like_noise_pred", like_noise),
        )
        if on
    ]
    chosen = product[0] if product else None
    if chosen == "min_snr_gamma":
        command.set("objective/weighting", "min_snr", "min_snr_gamma")
        command.set("objective.weighting.gamma", gamma, "min_snr_gamma")
    elif chosen == "debiased_estimation_loss" and not is_v:
        command.set("objective/weighting", "debiased", "debiased_estimation_loss")
    elif chosen == "scale_v_pred_loss_like_noise_pred":
        # SNR / (SNR + 1), with the SNR capped at 1000, is min_snr of v with this gamma to a thousandth.
        command.set("objective/weighting", "min_snr", chosen)
        command.set("objective.weighting.gamma", 1000, chosen)
    else:
        command.set("objective/weighting", "uniform", *(["min_snr_gamma"] if gamma == 0 else []))
    if chosen == "debiased_estimation_loss" and is_v:
        command.lack(chosen, "is defined for epsilon here; set objective/weighting=min_snr for v-prediction")
    for name in product[1:]:
        command.lack(
            name,
            f"weightings are multiplied there, one here: {chosen} is taken; objective/weighting=curve "
            "draws a product of both",
        )


def loss(given: Given, command: Command) -> None:
    kind = given.text("loss_type", "l2")
    if kind in ("huber", "smooth_l1"):
        command.set("objective/loss", kind, "loss_type")
        command.set("objective.loss.c", given.number("huber_c", 0.1), "huber_c")
        command.set("objective.loss.schedule", given.text("huber_schedule", "snr"), "huber_schedule")
    elif kind != "l2":
        command.lack("loss_type", "objective/loss=huber with a small objective.loss.c is close to it", kind)


def noise(given: Given, command: Command) -> None:
    """kohya adds both kinds; sdft has one."""
    offset, levels = given.number("noise_offset", 0), given.number("multires_noise_iterations", 0)
    offset_keys = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    if levels:
        command.set("objective/noise", "pyramid", "multires_noise_iterations")
        command.set("objective.noise.levels", levels, "multires_noise_iterations")
        command.set("objective.noise.discount", given.number("multires_noise_discount", 0.3), "multires_noise_discount")
        for key in offset_keys if offset else ():
            if key in given:
                command.lack(
                    key,
                    "one noise at a time here, and pyramid noise is taken; objective/noise=offset has it",
                    given.get(key),
                )
    elif offset:
        command.set("objective/noise", "offset", "noise_offset")
        command.set("objective.noise.strength", offset, "noise_offset")
        if given.flag("noise_offset_random_strength"):
            command.set("objective.noise.random", True, "noise_offset_random_strength")
        if given.number("adaptive_noise_scale", 0):
            command.set("objective.noise.adaptive", given.number("adaptive_noise_scale"), "adaptive_noise_scale")
    if gamma := given.number("ip_noise_gamma", 0):
        command.set("objective.input_perturbation", gamma, "ip_noise_gamma")
        command.differ("ip_noise_gamma: constant there; objective.input_perturbation falls to 0 over the run")


def timesteps(given: Given, command: Command) -> None:
    for key, option in (("min_timestep", "low"), ("max_timestep", "high")):
        value = given.number(key)
        if value is not None:
            command.set(f"objective.timesteps.{option}", value / 1000, key)


OBJECTIVE_RULES: Rules = {
    objective: ("v_parameterization", "zero_terminal_snr"),
    weighting: ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred"),
    loss: ("loss_type", "huber_c", "huber_schedule"),
    noise: (
        "noise_offset",
        "noise_offset_random_strength",
        "adaptive_noise_scale",
        "multires_noise_iterations",
        "multires_noise_discount",
        "ip_noise_gamma",
    ),
    timesteps: ("min_timestep", "max_timestep"),
}
