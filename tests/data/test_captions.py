"""What a visit learns of the captions of a sample."""

from __future__ import annotations

from collections import Counter

import pytest

from sdft.data.captions import Captions, Tags
from sdft.errors import UserError
from sdft.rng import Draws

TEXT = "zorbix, red, round, shiny, big"


def visits(captions: Captions, num: int = 400, seed: int = 0, key: str = "k") -> list[str]:
    return [captions.draw(Draws(seed, [key], [visit])) for visit in range(num)]


def test_one_caption_is_told_as_it_stands() -> None:
    captions = Captions(("a, b,  c",), template="{caption}, dreamy")
    assert set(visits(captions, 20)) == {captions.plain} == {"a, b,  c, dreamy"}
    assert captions.every == ("a, b,  c, dreamy",)


def test_shuffled_tags_keep_their_first_and_lose_none() -> None:
    told = visits(Captions((TEXT,), tags=Tags(shuffle=True, keep_first=2)))
    assert all(text.startswith("zorbix, red, ") for text in told)
    assert {tuple(sorted(text.split(", "))) for text in told} == {tuple(sorted(TEXT.split(", ")))}
    orders = Counter(told)
    assert len(orders) == 6  # 3! orders, each expected 67 times of 400
    assert min(orders.values()) > 35


def test_tags_are_dropped_at_their_share_and_never_all() -> None:
    """2 kept and 3 that may go: of 1200 chances at 0.25 about 300, deviation 15."""
    told = visits(Captions((TEXT,), tags=Tags(keep_first=2, drop=0.25)))
    assert abs(sum(5 - len(text.split(", ")) for text in told) - 300) < 60
    assert all(text.startswith("zorbix, red") for text in told)
    order = TEXT.split(", ")
    assert all([tag for tag in order if tag in text.split(", ")] == text.split(", ") for text in told)
    assert all(visits(Captions(("a, b",), tags=Tags(drop=1.0)), 50))


def test_a_tag_list_of_a_fixed_seed() -> None:
    """What seed 0 makes of the first visits; a change here changes every run that was made."""
    told = visits(Captions((TEXT,), tags=Tags(shuffle=True, keep_first=1, drop=0.3)), 3)
    assert told == GOLDEN


def test_captions_come_as_often_as_they_weigh() -> None:
    """0.7 and 0.3 of 2000, deviation 20; each visit of each key chooses anew."""
    captions = Captions(("long", "short"), weights=(7, 3))
    counts = Counter(visits(captions, 2000))
    assert abs(counts["long"] - 1400) < 80
    assert visits(captions, 50, key="a") != visits(captions, 50, key="b")
    assert Counter(visits(Captions(("a", "b", "c")), 900)).keys() == {"a", "b", "c"}
    assert captions.every == ("long", "short")


def test_a_visit_is_told_the_same_again() -> None:
    captions = Captions((TEXT, "a, b, c"), tags=Tags(shuffle=True, drop=0.3))
    assert visits(captions) == visits(captions)
    assert visits(captions) != visits(captions, seed=1)


def test_captions_that_cannot_be_listed() -> None:
    assert Captions((TEXT,), tags=Tags(shuffle=True)).every is None
    assert Captions((TEXT,), tags=Tags()).every == (TEXT,)


@pytest.mark.parametrize(("options", "word"), [({"keep_first": 1}, "keep_first"), ({"separator": " "}, "separator")])
def test_options_that_mean_nothing_are_refused(options, word: str) -> None:
    with pytest.raises(UserError, match=f"data.tags.{word}"):
        Tags(**options)


GOLDEN = ["zorbix, red, shiny, round, big", "zorbix, big", "zorbix, shiny, big, round, red"]
