"""What is encoded once: moments of pictures and states of captions, made where missing and read from the cache after.

Knows addresses and who makes which entry; the encoders are callables given by the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdft.data.cache import Cache, digest, fingerprint
from sdft.data.dataset import ImageDataset, Embeddings, Variant, collate
from sdft.data.packed_strings import SearchableStrings, PackedStrings
from sdft.data.scan import Scan, in_threads
from sdft.progress import tqdm

PIXELS_AT_ONCE = 4 * 1024 * 1024
"""Of one batch of the encoder: four pictures at SDXL's size."""
TRANSFORM = "cover, lanczos, [-1, 1]"
"""Says how pixels are made from a picture and a cut: a change of `images.cut_image` needs another word here."""
CAPTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class Ranks:
    """Who shares the work."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    """waits until all are there"""


def prepared(
    pictures: ImageDataset, variants: Sequence[Variant], batch_size: int
) -> Iterator[tuple[list[Variant], Tensor]]:
    """Variants in batches of one size, with their pixels, decoded in threads ahead of who asks."""
    groups = []
    for (h, w), indices in pictures.by_size(dict.fromkeys(index for index, _ in variants)).items():
        members, num = set(indices), max(1, min(batch_size, PIXELS_AT_ONCE // (h * w)))
        same = [variant for variant in variants if variant[0] in members]
        groups += [same[i : i + num] for i in range(0, len(same), num)]

    def pixels_of(group: list[Variant]) -> tuple[list[Variant], Tensor]:
        return group, collate([pictures.variant(index, flip) for index, flip in group]).pixels_BCHW

    return in_threads(pixels_of, groups, ahead=4)


class CachedMoments(Mapping[Variant, Tensor]):
    """Moments by variant, read from the cache.

    addresses: of the variants of `pictures`, in their order.
    """

    def __init__(self, cache: Cache, pictures: ImageDataset, addresses: Sequence[str]):
        self.cache, self.pictures, self.addresses = cache, pictures, addresses

    def _address(self, variant: Variant) -> str:
        index, flip = variant
        return self.addresses[2 * index + flip if self.pictures.flip else index]

    def __getitem__(self, variant: Variant) -> Tensor:
        return self.cache[self._address(variant)]

    def prefetch(self, variants: Sequence[Variant]) -> None:
        self.cache.prefetch(map(self._address, variants))

    def __iter__(self) -> Iterator[Variant]:
        return self.pictures.cacheable_variants()

    def __len__(self) -> int:
        return len(self.addresses)


class CachedEmbeddings:
    """Text states, read from the cache: of one text that all encoders are told, or of one for each.

    captions, addresses: all of them in one order.
    widths: channels of the context that each encoder gives; pooled_width: of the vector that the last one gives.

    One entry is the context, row by row, and the pooled vector behind it: one reading gets both.
    """

    def __init__(
        self, cache: Cache, captions: SearchableStrings, addresses: Sequence[str], widths: Sequence[int], pooled_width: int
    ):
        self.cache, self.captions, self.addresses = cache, captions, addresses
        self.widths, self.pooled_width = list(widths), pooled_width

    def _address(self, text: str) -> str:
        place = self.captions.find(text)
        assert place is not None, f"the caption {text!r} was not encoded"
        return self.addresses[place]

    def prefetch(self, texts: Sequence[str]) -> None:
        self.cache.prefetch(map(self._address, texts))

    def _states(self, text: str) -> Embeddings:
        both = self.cache[self._address(text)]
        context, pooled_P = both.split([len(both) - self.pooled_width, self.pooled_width])
        return context.view(-1, sum(self.widths)), pooled_P

    def __call__(self, told: Sequence[str]) -> Embeddings:
        states = {text: self._states(text) for text in dict.fromkeys(told)}
        context_LD, pooled_P = states[told[-1]]
        if len(states) > 1:
            parts = [states[text][0].split(self.widths, dim=-1)[place] for place, text in enumerate(told)]
            context_LD = torch.cat(parts, dim=-1)
        return context_LD, pooled_P


def cached_moments(
    cache: Cache,
    encoder: str,
    pictures: ImageDataset,
    seen: Scan,
    make: Callable[[Sequence[Variant]], Iterator[tuple[Variant, Tensor]]],
    ranks: Ranks,
) -> CachedMoments:
    """The moments of every variant; those that no run has made yet are made now, each by one rank.

    encoder: fingerprint of the VAE; make: gives the moments of variants.
    """
    addresses = PackedStrings(moments_address(pictures, seen, v, encoder) for v in pictures.cacheable_variants())
    mine = set(own(cache.missing(addresses), ranks))
    variants = zip(addresses, pictures.cacheable_variants(), strict=True)
    one_of = {address: variant for address, variant in variants if address in mine}
    address_of = {variant: address for address, variant in one_of.items()}
    for variant, moments in make(list(address_of)):
        cache.put(address_of[variant], moments)
    cache.flush()
    ranks.barrier()
    cache.refresh()
    return CachedMoments(cache, pictures, addresses)


def moments_address(pictures: ImageDataset, seen: Scan, variant: Variant, encoder: str) -> str:
    """Bytes of the picture, how it is cut, and what encodes it."""
    index, flip = variant
    content, hw = seen.digest(index), tuple(seen.hw_N2[index].tolist())
    if content is None:
        image = pictures.source[index].image_HWC
        content, hw = hashlib.sha256(image.tobytes()).hexdigest(), image.shape[:2]
    cut = pictures.cut(index, hw, flip)
    return digest([TRANSFORM, content, cut.resized_hw, cut.top, cut.left, cut.target_hw, flip, encoder])


def cached_embeddings(
    cache: Cache,
    captions: SearchableStrings,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    ids: Callable[[str], Any],
    encoders: Sequence[nn.Module],
    ranks: Ranks,
) -> CachedEmbeddings:
    """The states of every caption; those that no run has made yet are made now, each by one rank."""
    encoder = fingerprint(*encoders)
    addresses = PackedStrings(digest([ids(caption), encoder]) for caption in captions)
    missing = set(own(cache.missing(addresses), ranks))
    mine = [pair for pair in zip(captions, addresses, strict=True) if pair[1] in missing]
    for first in tqdm(range(0, len(mine), CAPTIONS_AT_ONCE), desc="captions", disable=len(mine) < 512, leave=False):
        group = mine[first : first + CAPTIONS_AT_ONCE]
        with torch.no_grad():
            contexts_BLD, pooled_BP = encode([caption for caption, _ in group])
        for (_, address), context_LD, pooled_P in zip(group, contexts_BLD, pooled_BP, strict=True):
            cache.put(address, torch.cat([context_LD.flatten(), pooled_P]))
    cache.flush()
    ranks.barrier()
    cache.refresh()
    widths = [encoder.config.hidden_size for encoder in encoders]
    return CachedEmbeddings(cache, captions, addresses, widths, encoders[-1].config.projection_dim)


def own(addresses: Sequence[str], ranks: Ranks) -> list[str]:
    """Those that one rank makes: by address, so that it does not matter what another has already written."""
    return [address for address in addresses if int(address[:8], 16) % ranks.world_size == ranks.rank]
