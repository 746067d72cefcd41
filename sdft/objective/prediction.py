"""What a denoiser can predict, and how an error of each kind of prediction counts as an error of the noise or of z0.

With z_t = a z0 + s eps, the denoiser predicts

- `epsilon`: eps (Ho et al., arXiv:2006.11239),
- `v_prediction`: a eps - s z0 (Salimans and Ho, arXiv:2202.00512), where a^2 + s^2 = 1,
- `sample`: z0,
- `flow_prediction`: eps - z0 (Liu et al., arXiv:2209.03003), where a + s = 1.
"""

from __future__ import annotations

from torch import Tensor

from sdft.protocols import Prediction


def target_of(prediction: Prediction, z0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The right prediction for z_t = a z0 + s eps."""
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return a * eps - s * z0
    return z0 if prediction == "sample" else eps - z0


def weight_for_z0(weight: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
    """`weight` of the squared error of z0, as a weight of the squared error of the prediction.

    An error d of eps is an error s d / a of z0; of v, s d; of the flow, s d with s = 1 / (1 + sqrt(snr)).
    """
    if prediction == "epsilon":
        return weight / snr
    if prediction == "v_prediction":
        return weight / (snr + 1)
    return weight if prediction == "sample" else weight / (1 + snr.sqrt()).square()


def weight_for_eps(weight: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
    """`weight` of the squared error of eps, as a weight of the squared error of the prediction.

    An error d of v is an error a d of eps, as eps = a v + s z_t; of z0, a d / s; of the flow, a d.
    """
    return weight if prediction == "epsilon" else weight_for_z0(weight * snr, snr, prediction)
