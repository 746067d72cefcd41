"""The content of a LoRA of any kind: the factors and the scale of each layer.

Knows the formulas of LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), and of LoHa, LoKr and LoCon as in LyCORIS
(arXiv:2309.14859). Must not depend on files or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["lora", "dora", "locon", "loha", "lokr"]

DOWN, MID, UP, DORA = "lora_down.weight", "lora_mid.weight", "lora_up.weight", "dora_scale"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_CORES = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
TENSORS = (DOWN, MID, UP, DORA, *LOHA, *LOHA_CORES, *LOKR)
"""kohya's names of the tensors of a layer, besides `alpha`."""

PEFT_NAMES = {DOWN: "lora_A", UP: "lora_B", DORA: "lora_magnitude_vector"}
"""kohya's names -> peft's; the other tensors have the same name in both."""


@dataclass(frozen=True)
class Layer:
    """The delta of one module's weight W, by kind:

    `lora`, `locon` (a convolution): s up down; `dora`: each row of W + s up down is rescaled to the norm `dora_scale`;
    `loha`: s (w1_a w1_b) * (w2_a w2_b); `lokr`: s kron(w1, w2). s is `scale`.
    """

    tensors: Mapping[str, Tensor]
    """By kohya's names, in kohya's shapes."""
    alpha: float

    @property
    def kind(self) -> Kind:
        if DOWN in self.tensors or UP in self.tensors:
            down = self.tensors.get(DOWN)
            return "dora" if DORA in self.tensors else "locon" if down is not None and down.dim() > 2 else "lora"
        return "loha" if any(name.startswith("hada_") for name in self.tensors) else "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None for a LoKr of two full matrices."""
        tensors = self.tensors
        if self.kind == "lokr":
            low = tensors.get("lokr_w2_b", tensors.get("lokr_w1_b"))
            return None if low is None else len(low)
        return len(tensors["hada_w1_b"] if self.kind == "loha" else tensors[DOWN])

    @property
    def scale(self) -> float:
        """alpha / rank; 1 for a LoKr of two full matrices, which LyCORIS and ComfyUI do not scale by alpha."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Rows and columns of the delta; the kernel of a convolution counts as columns.

        Raises ValueError if a tensor is missing, is not one of this kind, or does not fit the others.
        """
        return SHAPES[self.kind]({name: tuple(tensor.shape) for name, tensor in self.tensors.items()})

    @property
    def peft_tensors(self) -> dict[str, Tensor]:
        """The tensors with peft's names and shapes; `mid`, which peft does not have, is multiplied into `down`."""
        tensors = {PEFT_NAMES.get(name, name): tensor for name, tensor in self.tensors.items()}
        if MID in tensors:
            mid, down = tensors.pop(MID), tensors["lora_A"]
            product = torch.einsum("rshw,si->rihw", mid.float(), down.flatten(1).float())
            tensors["lora_A"] = product.to(down.dtype)
        if DORA in self.tensors:
            scale = self.tensors[DORA]
            tensors["lora_magnitude_vector"] = scale.flatten() if scale.dim() == 2 else scale.transpose(0, 1)
        return tensors


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: its layers by `part/module`, and the metadata of its file."""

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def of_part(self, part: str) -> dict[str, Layer]:
        """The layers of one part, by module."""
        return {name.partition("/")[2]: layer for name, layer in self.layers.items() if name.startswith(f"{part}/")}

    @property
    def not_in_diffusers(self) -> list[str]:
        """The layers that diffusers cannot represent: LoHa and LoKr."""
        return [name for name, layer in self.layers.items() if layer.kind in ("loha", "lokr")]


def network_metadata(lora: LoraFile) -> dict[str, str]:
    """The `ss_network_*` metadata of kohya's files."""
    ranks, alphas = ({getattr(layer, name) for layer in lora.layers.values()} - {None} for name in ("rank", "alpha"))
    plain = all(layer.kind in ("lora", "locon") for layer in lora.layers.values())
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def kohya_magnitude(magnitude: Tensor, down: Tensor) -> Tensor:
    """DoRA magnitudes in kohya's shape, from peft's ([out]; [1, out, 1, 1] for convolutions) or from kohya's."""
    if magnitude.dim() == 1 or (magnitude.dim() == 4 and len(magnitude) == 1):
        return magnitude.reshape(-1, *[1] * (down.dim() - 1))
    return magnitude


def most_common(values: list) -> object:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


Shapes = Mapping[str, tuple[int, ...]]


def _lora_shape(shapes: Shapes) -> tuple[int, int]:
    _require(shapes, {DOWN, UP}, {MID, DORA})
    _require_shapes(shapes, len(shapes[DOWN]) in (2, 4), len(shapes[UP]) in (2, 4))
    (rank, *inner), (rows, *across) = shapes[DOWN], shapes[UP]
    _require_shapes(shapes, rank > 0, prod(across) == rank)
    # Norms of rows only: LyCORIS can also normalise columns, which peft cannot.
    _require_shapes(shapes, DORA not in shapes or shapes[DORA] == (rows, *[1] * len(inner)))
    if MID not in shapes:
        return rows, prod(inner)
    _require_shapes(shapes, prod(inner[1:]) == 1, len(shapes[MID]) == 4, shapes[MID][:2] == (rank, rank))
    return rows, inner[0] * prod(shapes[MID][2:])


def _loha_shape(shapes: Shapes) -> tuple[int, int]:
    cores = LOHA_CORES if any(name in shapes for name in LOHA_CORES) else ()
    _require(shapes, {*LOHA, *cores}, set())
    first, second, *others = (shapes[name] for name in LOHA)
    _require_shapes(shapes, [first, second] == others, len(first) == len(second) == 2)
    (outer, inner), (rank, columns) = first, second
    if not cores:
        _require_shapes(shapes, inner == rank > 0)
        return outer, columns
    core, same = (shapes[name] for name in cores)
    _require_shapes(shapes, outer == rank > 0, core == same, len(core) == 4, core[:2] == (rank, rank))
    return inner, columns * prod(core[2:])


def _lokr_shape(shapes: Shapes) -> tuple[int, int]:
    _require(shapes, set(), set(LOKR))
    (a, b), (c, d) = (_lokr_factor(shapes, f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
    return a * c, b * d


def _lokr_factor(shapes: Shapes, whole: str, core: str) -> tuple[int, int]:
    low = [f"{whole}_a", f"{whole}_b"]
    if whole in shapes:
        _require_shapes(shapes, not {*low, core} & shapes.keys(), len(shapes[whole]) in (2, 4))
        return shapes[whole][0], prod(shapes[whole][1:])
    _require(shapes, set(low), set(shapes))
    _require_shapes(shapes, *(len(shapes[name]) == 2 for name in low))
    (outer, inner), (rank, columns) = (shapes[name] for name in low)
    if core not in shapes:
        _require_shapes(shapes, inner == rank > 0)
        return outer, columns
    _require_shapes(shapes, len(shapes[core]) == 4, shapes[core][:2] == (outer, rank))
    return inner, columns * prod(shapes[core][2:])


def _require(shapes: Shapes, needed: set[str], allowed: set[str]) -> None:
    if missing := sorted(needed - shapes.keys()):
        raise ValueError(f"has no {' and no '.join(missing)}")
    if unexpected := sorted(shapes.keys() - needed - allowed):
        raise ValueError(f"has {' and '.join(unexpected)}, which does not belong to its other tensors")


def _require_shapes(shapes: Shapes, *conditions: bool) -> None:
    if not all(conditions):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise ValueError(f"has shapes that contradict each other ({listed})")


SHAPES = {"lora": _lora_shape, "dora": _lora_shape, "locon": _lora_shape, "loha": _loha_shape, "lokr": _lokr_shape}
