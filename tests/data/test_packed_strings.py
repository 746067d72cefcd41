"""Packed lists say what plain ones say."""

from __future__ import annotations

import sdft.data.packed_strings
from sdft.data.packed_strings import Concatenated, PackedStrings, SearchableStrings, repeated, unique

TEXTS = ["", "a", "日本/\udcff.png", "a", "b" * 1000, "", "a"]


def test_strings_are_a_list_of_texts() -> None:
    packed = PackedStrings(TEXTS)
    assert list(packed) == TEXTS
    assert packed[-3:] == TEXTS[-3:]
    assert packed[-1] == "a"
    assert len(packed) == len(TEXTS)
    assert not PackedStrings()


def test_lists_end_to_end_know_whose_a_position_is() -> None:
    both = Concatenated([2, 0, 3])
    assert len(both) == 5
    assert [both.locate(position) for position in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


def test_what_is_there_again_is_named_in_order() -> None:
    assert repeated(PackedStrings(TEXTS)) == [(3, 1), (5, 0), (6, 3)]
    assert list(unique(PackedStrings(TEXTS))) == ["", "a", TEXTS[2], TEXTS[4]]


def test_lookup_finds_what_was_added_and_nothing_else() -> None:
    texts = [f"name {i}" for i in range(500)]
    found = SearchableStrings(texts)
    assert [found.find(text) for text in texts] == list(range(500))
    assert found.find("name 500") is None
    found.append("name 500")
    assert found.find("name 500") == 500
    assert SearchableStrings().find("") is None


def test_texts_of_one_mark_are_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(sdft.data.packed_strings, "string_hash", lambda text: 2**64 - 1 - len(text) // 2)
    texts = ["aa", "bb", "cc", "c", "dddd"]
    found = SearchableStrings(texts)
    assert [found.find(text) for text in texts] == [0, 1, 2, 3, 4]
    assert found.find("xx") is None
    assert repeated(PackedStrings(["aa", "bb"])) == []
