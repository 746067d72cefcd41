"""OFT and BOFT as a tuning: the blocks of each layer's rotation. `formats.rotation` has the layer and the formula."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import nn

from sdft.errors import UserError
from sdft.formats.rotation import RotatedLayer

METHODS = ("oft", "boft")


def rotate_layers(model: nn.Module, ranks: Mapping[str, int], method: str) -> None:
    """Let the outputs of linear layers and convolutions be rotated. ranks: names of the modules -> largest block.

    Raises UserError for a layer whose outputs cannot be cut into such blocks.
    """
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        rows = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        model.set_submodule(name, RotatedLayer(layer, block_shape(method, rows, rank, name)))


def block_shape(method: str, rows: int, rank: int, name: str) -> tuple[int, ...]:
    """The shape of the blocks of a rotation of `rows` channels: K x N x N, or M x K x N x N for `boft`.

    N is the largest that is possible up to `rank`. For OFT it divides the rows and is at most K, which LyCORIS' loader
    requires. For BOFT it is even and K a power of two, so that M = log2(K) + 1 rotations mix all channels. As in
    LyCORIS, except that a `rank` above the root of the rows makes smaller blocks there.
    """
    if method == "oft":
        size = next(n for n in range(min(rank, isqrt(rows)), 0, -1) if rows % n == 0)
        if size == 1:
            raise UserError(f"tuning.rank={rank}: oft cannot cut the {rows} outputs of {name} into blocks of 2 or more")
        return rows // size, size, size
    sizes = [n for n in range(2, rows + 1, 2) if rows % n == 0 and (rows // n).bit_count() == 1]
    if not sizes or sizes[0] > rank:
        remedy = f"set rank={sizes[0]} or more" if sizes else "leave it out with tuning.exclude"
        raise UserError(f"tuning.rank={rank}: boft cannot cut the {rows} outputs of {name} into such blocks; {remedy}")
    size = max(n for n in sizes if n <= rank)
    num = rows // size
    return num.bit_length(), num, size, size
