"""Images of the class beside those of the user."""

from __future__ import annotations

from sdft.data.source import Source
from sdft.data.sources.mix import Mix
from sdft.errors import UserError

OWN, CLASS = "own", "class"


def beside(own: Source, of_class: Source, shuffle_shards: int | None) -> Mix:
    """Both sources, each with half of the images of a pass: those of the smaller one are repeated.

    Raises UserError for sets that are read a few shards at a time, in which all images of the class would come at once.
    """
    if shuffle_shards is not None:
        raise UserError(
            f"class_images=generated: data.shuffle_shards={shuffle_shards} reads a few shards at a time, and the "
            "images of the class are in none; set data.shuffle_shards=null, with data.cache=disk for sets larger than "
            "data.cache_limit_gb"
        )
    return Mix({OWN: own, CLASS: of_class}, weights={OWN: 1.0, CLASS: 1.0})
