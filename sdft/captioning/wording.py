"""The words of captions: templates, tags and sentences, dropped and replaced words. Pure text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from sdft.data.captions import checked_template
from sdft.errors import UserError
from sdft.types import Fraction, Index

Form = Literal["unchanged", "tags", "sentence"]
FRAME = ("A picture of ", ".")
"""Of a sentence that is made of tags."""
ARTICLES = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)
OPENINGS = re.compile(
    r"^(?:this is |there is |there are )?(?:an? |the )?"
    r"(?:picture|photo|photograph|image|painting|drawing|illustration)s? of\s+",
    re.IGNORECASE,
)
"""What captions begin with before they say what is seen."""
JOINTS = re.compile(r"\s*(?:[,;.]|\band\b|\bwith\b|\bin front of\b|\bnext to\b)\s*", re.IGNORECASE)


class Wording:
    """What is done to each caption, in this order.

    form: `tags` takes a sentence apart, `sentence` makes one of tags; see `tags_of` and `sentence_of`.
    replace: words, phrases or tags to replace, whole and in any case. drop: those to remove; `*` stands for any letters
        in tags between commas. least, most_share: tags in fewer captions than `least`, or in a larger share of them
        than `most_share`, are removed; they need to be counted, see `counted`.
    trigger, template: the final caption; the template has the fields `{caption}` and `{trigger}`.
    """

    def __init__(
        self,
        template: str = "{caption}",
        trigger: str = "",
        drop: Sequence[str] = (),
        replace: Mapping[str, str] | None = None,
        form: Form = "unchanged",
        least: Index = 0,
        most_share: Fraction = 1.0,
    ):
        self.template = checked_template("wording.template", template, "trigger")
        if "{trigger}" in template and not trigger:
            raise UserError(f"wording.template={template!r} has the field {{trigger}}: set wording.trigger=WORD")
        if trigger and "{trigger}" not in template:
            self.template = "{trigger}, " + self.template
        if unnamed := [word for word in (*drop, *(replace or {})) if not word.strip()]:
            raise UserError(f"wording: {unnamed[0]!r} is no word to drop or replace")
        self.trigger, self.drop, self.replace, self.form = trigger, tuple(drop), dict(replace or {}), form
        self.least, self.most_share = least, most_share
        self._rare: set[str] = set()

    @property
    def changes(self) -> bool:
        """Whether any caption is changed."""
        rules = (self.trigger, self.drop, self.replace, self.least, self.form != "unchanged", self.most_share < 1)
        return any(rules) or self.template != "{caption}"

    def counted(self, captions: Sequence[str]) -> Wording:
        """This wording, with the tags of these captions counted for `least` and `most_share`."""
        counts = Counter(tag for caption in captions for tag in set(split_tags(caption)))
        most = self.most_share * len(captions)
        self._rare = {tag for tag, count in counts.items() if count < self.least or count > most}
        return self

    def __call__(self, caption: str) -> str:
        """The caption as it is written; a caption that has the trigger word already is not given it again."""
        text = " ".join(caption.split())
        if self.form != "unchanged":
            text = ", ".join(tags_of(text)) if self.form == "tags" else sentence_of(text)
        for old, new in self.replace.items():
            text = whole(old).sub(lambda _, new=new: new, text)  # type: ignore[misc]
        text = self._without_dropped(text)
        if self.trigger and whole(self.trigger).search(text):
            return text
        return tidy(self.template.format(caption=text, trigger=self.trigger))

    def _without_dropped(self, text: str) -> str:
        tags = split_tags(text)
        if len(tags) > 1:
            patterns = [pattern.lower() for pattern in self.drop]
            kept = [tag for tag in tags if tag not in self._rare]
            kept = [tag for tag in kept if not any(fnmatchcase(tag.lower(), pattern) for pattern in patterns)]
            text = ", ".join(kept)
        for word in self.drop:
            if "*" not in word:
                text = whole(word).sub("", text)
        return tidy(text)


def whole(word: str) -> re.Pattern[str]:
    """A word or phrase, not as a part of a longer word, in any case."""
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)


def tidy(text: str) -> str:
    """Without double spaces, commas without a tag between them, and spaces before punctuation."""
    text = re.sub(r"\s+([,.;])", r"\1", " ".join(text.split()))
    text = re.sub(r"(?:,\s*)+,", ",", text)
    return text.strip(" ,;")


def split_tags(text: str) -> list[str]:
    """The parts between commas."""
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def sentence_of(text: str) -> str:
    """`cat, red hat, snow` as `A picture of cat, red hat and snow.`; a text without commas is unchanged."""
    tags = split_tags(text)
    if len(tags) < 2:
        return text
    return f"{FRAME[0]}{', '.join(tags[:-1])} and {tags[-1]}{FRAME[1]}"


def tags_of(text: str) -> list[str]:
    """The parts of a sentence without articles: what `sentence_of` was made of, and a guess for other sentences."""
    text = OPENINGS.sub("", text.strip())
    parts = [ARTICLES.sub("", part.strip()) for part in JOINTS.split(text)]
    return list(dict.fromkeys(part for part in parts if part))


def tag_table(captions: Iterable[str]) -> list[tuple[str, int]]:
    """(tag, number of captions that have it), the most frequent first."""
    counts = Counter(tag for caption in captions for tag in set(split_tags(caption)))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
