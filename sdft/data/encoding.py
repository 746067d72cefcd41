"""Encoding once: moments of images and prompt embeddings, computed if missing and read from the disk cache afterwards.

Knows addresses and which rank computes which entry; the encoders are callables of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdft.data.augmentation import Colours
from sdft.data.cache import Cache, digest, fingerprint
from sdft.data.dataset import Embeddings, ImageDataset, Variant, collate
from sdft.data.packed_strings import PackedStrings, SearchableStrings
from sdft.data.scan import Scan
from sdft.data.source import Source
from sdft.data.threads import in_threads
from sdft.progress import ENOUGH_FOR_A_BAR, tqdm

PIXELS_AT_ONCE = 4 * 1024 * 1024
"""Pixels per batch of the encoder: four images of 1024 x 1024."""
TRANSFORM = "cover, lanczos, [-1, 1]"
"""Version of the transform in addresses: a change of `images.crop_image` needs another text here."""
CAPTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the work."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    """waits for all ranks"""


def prepared(
    dataset: ImageDataset, variants: Sequence[Variant], batch_size: int
) -> Iterator[tuple[list[Variant], Tensor]]:
    """Batches of variants of one size with their pixels (B x C x H x W), decoded in threads in advance."""
    groups = []
    for (h, w), indices in dataset.by_size(dict.fromkeys(index for index, *_ in variants)).items():
        members, num = set(indices), max(1, min(batch_size, PIXELS_AT_ONCE // (h * w)))
        same = [variant for variant in variants if variant[0] in members]
        groups += [same[i : i + num] for i in range(0, len(same), num)]

    def pixels_of(group: list[Variant]) -> tuple[list[Variant], Tensor]:
        return group, collate([dataset.variant(*variant) for variant in group]).pixels_BCHW

    return in_threads(pixels_of, groups, ahead=4)


def moments_maker(
    dataset: ImageDataset, encode: Callable[[Tensor], Tensor], device: torch.device, batch_size: int
) -> Callable[[Sequence[Variant]], Iterator[tuple[Variant, Tensor]]]:
    """A function that computes moments of variants in batches of one size, with images decoded in advance."""

    def make(variants: Sequence[Variant]) -> Iterator[tuple[Variant, Tensor]]:
        few = len(variants) < ENOUGH_FOR_A_BAR
        with tqdm(total=len(variants), desc="encoding", unit="image", disable=few, leave=False) as bar:
            for group, pixels_BCHW in prepared(dataset, variants, batch_size):
                yield from zip(group, encode(pixels_BCHW.to(device)).cpu(), strict=True)
                bar.update(len(group))

    return make


class CachedMoments(Mapping[Variant, Tensor]):
    """Moments by variant, read from the cache.

    addresses: of `dataset.cacheable_variants()`, in that order.
    """

    def __init__(self, cache: Cache, dataset: ImageDataset, addresses: Sequence[str]):
        self.cache, self.dataset, self.addresses = cache, dataset, addresses

    def _address(self, variant: Variant) -> str:
        index, flip, number = variant
        place = index * (self.dataset.variants or 1) + number
        return self.addresses[2 * place + flip if self.dataset.flip else place]

    def __getitem__(self, variant: Variant) -> Tensor:
        return self.cache[self._address(variant)]

    def prefetch(self, variants: Sequence[Variant]) -> None:
        self.cache.prefetch(map(self._address, variants))

    def __iter__(self) -> Iterator[Variant]:
        return self.dataset.cacheable_variants()

    def __len__(self) -> int:
        return len(self.addresses)


class CachedEmbeddings:
    """Prompt embeddings, read from the cache: of one caption for all text encoders, or of one for each.

    captions, addresses: of all captions, in the same order.
    widths: channels of the context from each encoder. pooled_width: of the pooled embedding.

    An entry is the flattened context followed by the pooled embedding, so that one read gets both.
    """

    def __init__(
        self,
        cache: Cache,
        captions: SearchableStrings,
        addresses: Sequence[str],
        widths: Sequence[int],
        pooled_width: int,
    ):
        self.cache, self.captions, self.addresses = cache, captions, addresses
        self.widths, self.pooled_width = list(widths), pooled_width

    def _address(self, text: str) -> str:
        place = self.captions.find(text)
        assert place is not None, f"the caption {text!r} was not encoded"
        return self.addresses[place]

    def prefetch(self, texts: Sequence[str]) -> None:
        self.cache.prefetch(map(self._address, texts))

    def _embeddings(self, text: str) -> Embeddings:
        both = self.cache[self._address(text)]
        context, pooled_P = both.split([len(both) - self.pooled_width, self.pooled_width])
        return context.view(-1, sum(self.widths)), pooled_P

    def __call__(self, captions: Sequence[str]) -> Embeddings:
        found = {text: self._embeddings(text) for text in dict.fromkeys(captions)}
        context_LD, pooled_P = found[captions[-1]]
        if len(found) > 1:
            parts = [found[text][0].split(self.widths, dim=-1)[place] for place, text in enumerate(captions)]
            context_LD = torch.cat(parts, dim=-1)
        return context_LD, pooled_P


def cached_moments(
    cache: Cache,
    encoder: str,
    dataset: ImageDataset,
    scan: Scan,
    make: Callable[[Sequence[Variant]], Iterator[tuple[Variant, Tensor]]],
    ranks: Ranks,
) -> CachedMoments:
    """The moments of every variant; missing ones are computed now, each by one rank.

    encoder: fingerprint of the VAE. make: computes the moments of variants.
    """
    addresses = PackedStrings(moments_address(dataset, scan, v, encoder) for v in dataset.cacheable_variants())
    mine = set(addresses_of_rank(cache.missing(addresses), ranks))
    variants = zip(addresses, dataset.cacheable_variants(), strict=True)
    one_of = {address: variant for address, variant in variants if address in mine}
    address_of = {variant: address for address, variant in one_of.items()}
    for variant, moments in make(list(address_of)):
        cache.put(address_of[variant], moments)
    cache.flush()
    ranks.barrier()
    cache.refresh()
    return CachedMoments(cache, dataset, addresses)


def moments_address(dataset: ImageDataset, scan: Scan, variant: Variant, encoder: str) -> str:
    """The address of the bytes of an image, its crop, and its encoder."""
    index, flip, _ = variant
    place = dataset.items.sample_of[index]
    content, hw = scan.digest(place), tuple(scan.hw_N2[place].tolist())
    if content is None:
        image = dataset.source[place].image_HWC
        content, hw = hashlib.sha256(image.tobytes()).hexdigest(), image.shape[:2]
    plan, colours = dataset.plan_of(variant, hw)
    changes = [plan.angle, colours] if plan.angle or colours != Colours() else []
    return digest([TRANSFORM, content, plan.resized_hw, plan.top, plan.left, plan.target_hw, flip, encoder, *changes])


def all_captions(sources: Iterable[Source]) -> PackedStrings | None:
    """Every caption of some sources, and the empty one; None if they cannot be listed, such as shuffled tags."""
    captions = PackedStrings([""])
    for source in sources:
        for index in range(len(source.keys)):
            sample = source[index]
            every = sample.captions.every if sample.captions else (sample.caption,)
            if every is None:
                return None
            for caption in every:
                captions.append(caption)
    return captions


def cached_embeddings(
    cache: Cache,
    captions: SearchableStrings,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    ids: Callable[[str], Any],
    encoders: Sequence[nn.Module],
    ranks: Ranks,
) -> CachedEmbeddings:
    """The prompt embeddings of every caption; missing ones are computed now, each by one rank.

    encode: captions -> context B x L x D and pooled B x P. ids: token ids of a caption, by which it is addressed.
    """
    encoder = fingerprint(*encoders)
    addresses = PackedStrings(digest([ids(caption), encoder]) for caption in captions)
    missing = set(addresses_of_rank(cache.missing(addresses), ranks))
    mine = [pair for pair in zip(captions, addresses, strict=True) if pair[1] in missing]
    few = len(mine) < ENOUGH_FOR_A_BAR
    for first in tqdm(range(0, len(mine), CAPTIONS_AT_ONCE), desc="captions", disable=few, leave=False):
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


def addresses_of_rank(addresses: Sequence[str], ranks: Ranks) -> list[str]:
    """The addresses that this rank computes; chosen by value, so that what other ranks have written is irrelevant."""
    return [address for address in addresses if int(address[:8], 16) % ranks.world_size == ranks.rank]
