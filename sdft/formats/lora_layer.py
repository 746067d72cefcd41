"""The content of a LoRA of any kind: the factors and the scale of each layer, and changes of norms and biases.

Knows the formulas of LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), and of LoHa, LoKr and LoCon as in LyCORIS
(arXiv:2309.14859); `rotation` knows those of OFT and BOFT. Must not depend on files or models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdft.formats.rotation import BLOCKS, RESCALE

Kind = Literal["lora", "dora", "locon", "loha", "lokr", "oft", "boft"]
ROTATIONS: tuple[Kind, ...] = ("oft", "boft")
"""Kinds whose change of a weight is a product with the weight."""

DOWN, MID, UP, DORA = "lora_down.weight", "lora_mid.weight", "lora_up.weight", "dora_scale"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_CORES = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
TENSORS = (DOWN, MID, UP, DORA, *LOHA, *LOHA_CORES, *LOKR, BLOCKS, RESCALE)
"""kohya's names of the tensors of a layer, besides `alpha`."""

PEFT_NAMES = {DOWN: "lora_A", UP: "lora_B", DORA: "lora_magnitude_vector"}
"""kohya's names -> peft's; the other tensors have the same name in both."""

LYCORIS: Mapping[Kind, str] = {"loha": "loha", "lokr": "lokr", "oft": "diag-oft", "boft": "boft"}
"""Kinds that diffusers does not have -> LyCORIS' names of them."""


@dataclass(frozen=True)
class Layer:
    """The delta of one module's weight W, by kind:

    `lora`, `locon` (a convolution): s up down; `dora`: each row of W + s up down is rescaled to the norm `dora_scale`;
    `loha`: s (w1_a w1_b) * (w2_a w2_b); `lokr`: s kron(w1, w2). s is `scale`. `oft`, `boft`: `rotation`.
    """

    tensors: Mapping[str, Tensor]
    """By kohya's names, in kohya's shapes."""
    alpha: float
    """Of a rotation, not a scale, but the bound of its angles; 0 for none."""

    @property
    def kind(self) -> Kind:
        if DOWN in self.tensors or UP in self.tensors:
            down = self.tensors.get(DOWN)
            return "dora" if DORA in self.tensors else "locon" if down is not None and down.dim() > 2 else "lora"
        if (blocks := self.tensors.get(BLOCKS)) is not None:
            return "oft" if blocks.dim() == 3 else "boft"
        return "loha" if any(name.startswith("hada_") for name in self.tensors) else "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of the factors, or the size of the blocks; None for a LoKr of two full matrices."""
        tensors = self.tensors
        if self.kind in ROTATIONS:
            return tensors[BLOCKS].shape[-1]
        if self.kind == "lokr":
            low = tensors.get("lokr_w2_b", tensors.get("lokr_w1_b"))
            return None if low is None else len(low)
        return len(tensors["hada_w1_b"] if self.kind == "loha" else tensors[DOWN])

    @property
    def scale(self) -> float:
        """alpha / rank; 1 for rotations, and for a LoKr of two full matrices, which LyCORIS does not scale."""
        return 1.0 if self.rank is None or self.kind in ROTATIONS else self.alpha / self.rank

    @property
    def delta_shape(self) -> tuple[int, int | None]:
        """Rows and columns of the delta; the kernel of a convolution counts as columns. Rotations fit any columns.

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
    """A LoRA: its layers by `part/module`, the metadata of its file, and the changes of weights that are vectors.

    vectors: by `part/module.weight` of norms, and `part/module.bias` of any layer.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def of_part(self, part: str) -> dict[str, Layer]:
        """The layers of one part, by module."""
        return {name.partition("/")[2]: layer for name, layer in self.layers.items() if name.startswith(f"{part}/")}

    @property
    def not_in_diffusers(self) -> list[str]:
        """The layers that diffusers cannot represent, LoHa, LoKr, OFT and BOFT, and the trained norms and biases."""
        return [*(name for name, layer in self.layers.items() if layer.kind in LYCORIS), *self.vectors]


class Misfit(NamedTuple):
    """A layer, a norm or a bias of a LoRA without a weight of its shape in a model.

    name: of the layer, or of the norm's or bias' weight. rows, columns: of what it changes; columns are None for a
    rotation, and for a norm or a bias, whose numbers are rows. there: the shape of the model's weight, if it has one.
    """

    name: str
    rows: int
    columns: int | None
    there: tuple[int, ...] | None
    is_vector: bool = False


def misfits(
    lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], vector_shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Misfit]:
    """What of a LoRA does not fit a model. shapes: of weights, `layer.weight`; vector_shapes: of norms and biases."""
    for name, layer in lora.layers.items():
        rows, columns = layer.delta_shape
        there = shapes.get(f"{name}.weight")
        if there is None or there[0] != rows or columns not in (None, prod(there[1:])):
            yield Misfit(name, rows, columns, there)
    for weight, change in lora.vectors.items():
        if vector_shapes.get(weight) != tuple(change.shape):
            yield Misfit(weight, len(change), None, vector_shapes.get(weight), is_vector=True)


def network_metadata(lora: LoraFile) -> dict[str, str]:
    """The `ss_network_*` metadata of kohya's files."""
    ranks, alphas = ({getattr(layer, name) for layer in lora.layers.values()} - {None} for name in ("rank", "alpha"))
    kinds = {layer.kind for layer in lora.layers.values()}
    norms = any(weight.endswith(".weight") for weight in lora.vectors)
    algorithms = [LYCORIS[kind] for kind in kinds if kind in LYCORIS and len(kinds) == 1]
    arguments = {**({"algo": algorithms[0]} if algorithms else {}), **({"train_norm": "True"} if norms else {})}
    return {
        "ss_network_module": "networks.lora" if kinds <= {"lora", "locon"} and not norms else "lycoris.kohya",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        **({"ss_network_args": json.dumps(arguments)} if arguments else {}),
    }


def with_one_alpha(lora: LoraFile) -> LoraFile:
    """The same deltas, where the LoRA layers of a part have one alpha, the most common one: `up` takes what differs.

    diffusers 0.42 ignores the alphas of single layers of the UNet in a kohya file (`get_peft_kwargs` misnames them),
    and would scale those layers wrongly. Other programs read both alike.
    """
    layers = dict(lora.layers)
    for part in dict.fromkeys(name.partition("/")[0] for name in layers):
        own = {name: layer for name, layer in layers.items() if name.startswith(f"{part}/") and UP in layer.tensors}
        alphas = [layer.alpha for layer in own.values() if layer.alpha]
        alpha = most_common(alphas) if alphas else 0.0
        for name, layer in own.items():
            if layer.alpha != alpha:
                up = layer.tensors[UP]
                scaled = (up.float() * (layer.alpha / alpha)).to(up.dtype)
                layers[name] = replace(layer, tensors={**layer.tensors, UP: scaled}, alpha=alpha)
    return replace(lora, layers=layers)


def kohya_magnitude(magnitude: Tensor, down: Tensor) -> Tensor:
    """DoRA magnitudes in kohya's shape, from peft's ([out]; [1, out, 1, 1] for convolutions) or from kohya's."""
    if magnitude.dim() == 1 or (magnitude.dim() == 4 and len(magnitude) == 1):
        return magnitude.reshape(-1, *[1] * (down.dim() - 1))
    return magnitude


def most_common(values: list[Any]) -> Any:
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


def _rotation_shape(shapes: Shapes) -> tuple[int, None]:
    _require(shapes, {BLOCKS}, {RESCALE})
    *stages, num, size, same = (0, 0, *shapes[BLOCKS]) if len(shapes[BLOCKS]) < 3 else shapes[BLOCKS]
    rows = num * size
    _require_shapes(shapes, len(stages) <= 1, rows > 0, size == same)
    # Rotation i of a BOFT exchanges rows within groups of 2^i blocks.
    _require_shapes(shapes, not stages or (stages[0] > 0 and size % 2 == 0 and num % 2 ** (stages[0] - 1) == 0))
    _require_shapes(shapes, RESCALE not in shapes or (shapes[RESCALE][:1] == (rows,) and prod(shapes[RESCALE]) == rows))
    return rows, None


SHAPES: Mapping[Kind, Callable[[Shapes], tuple[int, int | None]]] = {
    **{"lora": _lora_shape, "dora": _lora_shape, "locon": _lora_shape, "loha": _loha_shape, "lokr": _lokr_shape},
    **dict.fromkeys(ROTATIONS, _rotation_shape),
}
