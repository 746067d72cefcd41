"""Parts that have nothing to do wait on the CPU, so that others fit on a small GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdft.protocols import DiffusionModel


@contextmanager
def alone_on_device(model: DiffusionModel, part: str) -> Iterator[None]:
    """Inside the `with`, the frozen weights of all other parts are on the CPU, if the model has `offload_idle` set.

    Trainable weights stay: the optimizer and the strategy know where they are. May be entered again inside.
    """
    device = model.device
    if not model.offload_idle or device.type == "cpu" or model.working_device is not None:
        yield
        return
    others = [model.get_submodule(name) for name in model.PARTS if name != part]
    moved = [p for other in others for p in other.parameters() if not p.requires_grad and p.device == device]
    try:
        model.working_device = device
        for p in moved:
            p.data = p.data.to("cpu")
        yield
    finally:
        for p in moved:
            p.data = p.data.to(device)
        model.working_device = None
