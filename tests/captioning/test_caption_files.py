"""Captions are made where there are none, corrected, edited by rule, and never lost."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import Run, command_py, finish, start

from sdft.captioning.caption_files import CaptionFiles
from sdft.captioning.wording import Wording, sentence_of, tag_table, tags_of
from sdft.data import __main__ as commands
from sdft.data.sources import Folder, ToyWorld
from sdft.data.sources.listing import OWN_RECORD
from sdft.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Captions by a person beside 0 and, with its suffix in upper case, 1; in a table for 2; two for 3; none else."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    world = ToyWorld(["photo"], 8, "train", size=64)
    for i in range(8):
        Image.fromarray(world[i].image_HWC).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("mine, red\n")
    (folder / "1.TXT").write_text("also mine")
    rows = [{"file_name": "2.png", "text": "of a table"}, {"file_name": "3.png", "text": ["one", "two"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "4.txt").write_text(" \n")
    return folder


def run(command: str, capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [command, *words])
    commands.COMMANDS[command]()
    return capsys.readouterr().out


def texts(root: Path) -> dict[str, tuple[str, ...]]:
    source = Folder(str(root), "all", default_caption="")
    return {key: source[i].captions.texts for i, key in enumerate(source.keys)}


def test_captions_of_people_stay(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    before = {file.name: file.read_bytes() for file in root.glob("[0-3]*") if file.suffix.lower() == ".txt"}
    told = run("caption", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out", "wording.trigger=zorbix")
    assert "8 images, 4 to caption, 4 captions stay" in told
    assert "4 captions written" in told
    found = texts(root)
    assert [found[f"{i}.png"] for i in range(4)] == [("mine, red",), ("also mine",), ("of a table",), ("one", "two")]
    assert {name: (root / name).read_bytes() for name in before} == before
    assert all(re.fullmatch("zorbix, a picture of an? .+", found[f"{i}.png"][0]) for i in range(4, 8))
    assert (tmp_path / "out" / "captions.html").is_file()
    assert "8 images, 0 to caption" in run("caption", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out")


def test_only_made_captions_are_made_again(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = [f"root={root}", f"out={tmp_path}/out"]
    run("caption", capsys, monkeypatch, *words)
    (root / "5.txt").write_text("corrected by hand")
    told = run("caption", capsys, monkeypatch, *words, "overwrite=made", "captioner.prompt='one {noun}'")
    assert "3 to caption, 5 captions stay" in told
    found = texts(root)
    assert found["5.png"] == ("corrected by hand",)
    assert found["4.png"][0].startswith("one ")
    told = run("caption", capsys, monkeypatch, *words, "overwrite=all")
    assert "7 to caption, 1 captions stay" in told
    assert texts(root)["3.png"] == ("one", "two"), "several captions are never replaced"
    rows = [json.loads(line) for line in (root / OWN_RECORD).read_text().splitlines()]
    replaced = {row["before"].strip() for row in rows if "before" in row}
    assert {"mine, red", "also mine", "of a table", "corrected by hand"} <= replaced, "nothing is lost"


def test_what_cannot_be_decoded_is_named_and_the_rest_is_captioned(
    root: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (root / "6.png").write_bytes(b"no picture")
    told = run("caption", capsys, monkeypatch, f"root={root}", f"out={tmp_path}/out")
    assert "without caption: 6.png (not a known image format)" in told
    assert texts(root)["6.png"] == ("",)
    assert texts(root)["7.png"][0]


class SlowCaptioner:
    """One picture at a time, and slowly."""

    batch_size = 1

    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        time.sleep(0.2)
        return ["slowly made"] * len(images)


def test_a_kill_loses_no_caption_and_the_same_command_goes_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "captioner").mkdir(parents=True)
    (tmp_path / "conf" / "captioner" / "slow.yaml").write_text("_target_: test_caption_files.SlowCaptioner\n")
    words = ["caption", f"root={root}", f"out={tmp_path}/out", "captioner=slow", "--config-dir", f"{tmp_path}/conf"]
    job = Run(tmp_path / "job")
    (process,) = start(job, function=partial(command_py, "sdft.data", words))
    while not (root / "5.txt").is_file() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert finish([process]) == [-9]
    made = {file.name: file.stat().st_mtime_ns for file in (root / "4.txt", root / "5.txt")}
    assert finish(start(job, function=partial(command_py, "sdft.data", words))) == [0]
    assert {name: (root / name).stat().st_mtime_ns for name in made} == made, "they are not made again"
    assert all(texts(root)[f"{i}.png"] == ("slowly made",) for i in range(4, 8))


class TestCorrections:
    def corrected(self, root: Path, tmp_path: Path, rows: dict) -> Path:
        file = tmp_path / "corrections.json"
        file.write_text(json.dumps({"kind": "sdft captions", "captions": rows}))
        return file

    def test_they_are_taken(self, root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        rows = {"0.png": {"before": "mine, red", "text": " mine,  blue "}, "4.png": {"before": "", "text": "a new one"}}
        file = self.corrected(root, tmp_path, rows)
        told = run("edit", capsys, monkeypatch, f"root={root}", f"corrections={file}", "preview=true")
        assert "- mine, red" in told
        assert "+ mine, blue" in told
        assert "nothing was written" in told
        assert texts(root)["0.png"] == ("mine, red",)
        assert "2 captions changed" in run("edit", capsys, monkeypatch, f"root={root}", f"corrections={file}")
        assert (root / "0.txt").read_text() == "mine, blue\n"
        assert texts(root)["4.png"] == ("a new one",)
        assert "0 captions changed" in run("edit", capsys, monkeypatch, f"root={root}", f"corrections={file}")
        assert CaptionFiles(root).made_by(0) is None, "a person wrote it"

    @pytest.mark.parametrize(
        ("rows", "complaint"),
        [
            ({"0.png": {"before": "older", "text": "x"}}, r"0\.png has another caption now .*'mine, red'.*nothing was"),
            ({"9.png": {"before": "", "text": "x"}}, r"9\.png is not in"),
            ({"3.png": {"before": "one", "text": "x"}}, r"3\.png has several captions"),
            ({"0.png": {"before": "mine, red", "text": " "}}, r"0\.png would get an empty caption"),
            ({"0.png": "x"}, "is no file that the page of captions has exported"),
            ([], "is no file that the page of captions has exported"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, rows, complaint: str, root: Path, tmp_path: Path) -> None:
        before = texts(root)
        if isinstance(rows, dict) and "0.png" not in rows:
            rows["5.png"] = {"before": "", "text": "good"}
        with pytest.raises(UserError, match=rf"corrections=.*{complaint}"):
            CaptionFiles(root).corrections(self.corrected(root, tmp_path, rows))
        assert texts(root) == before


class TestWording:
    @pytest.mark.parametrize(
        ("options", "text", "expected"),
        [
            ({"trigger": "zorbix"}, "a cat", "zorbix, a cat"),
            ({"trigger": "zorbix"}, "a zorbix cat", "a zorbix cat"),
            ({"trigger": "zor"}, "a zorbix cat", "zor, a zorbix cat"),
            ({"trigger": "zorbix", "template": "{caption} by {trigger}"}, "a cat", "a cat by zorbix"),
            ({"drop": ["a picture of"]}, "A picture of a cat", "a cat"),
            ({"drop": ["cat"]}, "a cat and a category", "a and a category"),
            ({"drop": ["*background", "red"]}, "cat, white background, red, big", "cat, big"),
            ({"drop": ["red"]}, "red, cat", "cat"),
            ({"replace": {"girl": "woman"}}, "a Girl, two girls", "a woman, two girls"),
            ({"replace": {"a.b": r"\1"}}, "a.b axb", r"\1 axb"),
            ({"form": "sentence"}, "cat, red hat, snow", "A picture of cat, red hat and snow."),
            ({"form": "sentence"}, "cat", "cat"),
            ({"form": "tags"}, "A photo of a cat with a red hat, and snow.", "cat, red hat, snow"),
            ({}, "  two \n lines ", "two lines"),
        ],
    )
    def test_each_rule(self, options, text: str, expected: str) -> None:
        assert Wording(**options)(text) == expected

    def test_tags_to_sentences_and_back(self) -> None:
        for tags in (["cat", "red hat"], ["1girl", "long hair", "smile", "outdoors"], ["café", "кот", "猫"]):
            assert tags_of(sentence_of(", ".join(tags))) == tags

    def test_rare_and_common_tags_are_pruned(self) -> None:
        captions = ["cat, red", "cat, blue", "cat, red, odd", "cat, blue"]
        wording = Wording(least=2, most_share=0.9).counted(captions)
        assert list(map(wording, captions)) == ["red", "blue", "red", "blue"]
        assert tag_table(captions) == [("cat", 4), ("blue", 2), ("red", 2), ("odd", 1)]

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"template": "{trigger} {caption}"}, r"set wording\.trigger=WORD"),
            ({"template": "{caption.x}"}, r"wording\.template="),
            ({"drop": [" "]}, "' ' is no word to drop or replace"),
        ],
    )
    def test_rules_that_mean_nothing(self, options, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            Wording(**options)


def test_rules_for_all_captions(root: Path, capsys, monkeypatch) -> None:
    told = run("edit", capsys, monkeypatch, f"root={root}", "wording.replace={mine: ours}")
    assert "2 captions changed; what they were is in" in told
    assert texts(root)["0.png"] == ("ours, red",)
    assert (root / "1.TXT").read_text() == "also ours\n", "in the file that was there"
    with pytest.raises(SystemExit):
        run("edit", capsys, monkeypatch, f"root={root}", "wording.drop=['of a table']")
    assert "nothing would be left of the captions of 2.png" in capsys.readouterr().err


def test_the_table_of_tags(root: Path, capsys, monkeypatch) -> None:
    told = run("tags", capsys, monkeypatch, f"root={root}", "most=1")
    assert told.splitlines() == ["1   25%  also mine", "5 tags in 4 captions, 1 shown"]


class TestSharedNames:
    """`cat.jpg` and `cat.png` in one folder."""

    @pytest.fixture
    def twins(self, root: Path) -> Path:
        for file in [*root.glob("*.txt"), *root.glob("*.TXT"), root / "metadata.jsonl"]:
            file.unlink()
        Image.open(root / "0.png").save(root / "1.jpg")
        return root

    def test_each_has_its_own_caption(self, twins: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        run("caption", capsys, monkeypatch, f"root={twins}", f"out={tmp_path}/out")
        found = texts(twins)
        assert found["1.jpg"] == found["0.png"] != found["1.png"]
        assert sorted(file.name for file in twins.glob("1*.txt")) == ["1.jpg.txt", "1.png.txt"]

    def test_a_caption_of_both_stays(self, twins: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        (twins / "1.txt").write_text("of both\n")
        run("caption", capsys, monkeypatch, f"root={twins}", f"out={tmp_path}/out", "overwrite=all")
        assert (twins / "1.txt").read_text() == "of both\n"
        assert texts(twins)["1.jpg"] == texts(twins)["0.png"]


def test_what_a_person_writes_meanwhile_stays(root: Path) -> None:
    files = CaptionFiles(root)
    (root / "5.txt").write_text("by a person\n")
    (root / "6.txt").write_bytes(b"\xff")
    (root / "0.txt").write_text("mine, now green\n")
    assert files.write({0: "x", 4: "made", 5: "y", 6: "z"}, "judge") == ["0.png", "5.png", "6.png"]
    assert (root / "5.txt").read_text() == "by a person\n"
    assert (root / "0.txt").read_text() == "mine, now green\n"
    assert (root / "4.txt").read_text() == "made\n"


def test_what_is_replaced_is_kept_as_it_was(root: Path) -> None:
    (root / "0.txt").write_text("line one\n\n  line two, tag\n")
    CaptionFiles(root).write({0: "new"}, "a rule")
    (row,) = map(json.loads, (root / OWN_RECORD).read_text().splitlines())
    assert row["before"] == "line one\n\n  line two, tag\n"


def test_no_letters_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    row = {"5.png": {"before": "", "text": "\ud800"}}
    (tmp_path / "c.json").write_text(json.dumps({"kind": "sdft captions", "captions": row}))
    with pytest.raises(UserError, match=r"corrections=.*5\.png would get"):
        CaptionFiles(root).corrections(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"5\.png: would get a caption that is empty, or no Unicode"):
        CaptionFiles(root).write({4: "good", 5: "\ud800"}, "x")
    assert not (root / OWN_RECORD).exists()
    assert not list(root.glob(".*partial"))
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no file that the page of captions has exported"):
        CaptionFiles(root).corrections(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("command", "words", "complaint"),
    [
        ("caption", ["overwrite=yes"], "overwrite=yes"),
        ("edit", ["preview=maybe"], "preview=maybe"),
        ("edit", ["corrections=5"], "corrections=5"),
        ("edit", ["corrections=x.json", "wording.trigger=zorbix"], "corrections=FILE is taken as it is"),
        ("tags", ["most=abc"], "most=abc"),
        ("tags", ["most=-2"], "most=-2"),
        ("mask", ["overwrite=no"], "overwrite=no"),
        ("shard", ["out=x", "per_shard=0"], "per_shard=0"),
        ("shard", ["out=x", "most_gb=-1"], "most_gb=-1"),
    ],
)
def test_wrong_options_end_in_a_sentence(command: str, words, complaint: str, root: Path, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, capsys, monkeypatch, f"root={root}", *words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert len(told.strip().splitlines()) <= 2


def test_a_folder_called_as_a_number(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        run("tags", capsys, monkeypatch, "root=1234")
    assert "root=1234" in capsys.readouterr().err


def test_an_image_with_the_longest_name(root: Path) -> None:
    name = "c" * 250
    (root / "7.png").rename(root / f"{name}.png")
    files = CaptionFiles(root)
    assert files.write({len(files.keys) - 1: "a caption"}, "judge") == []
    assert texts(root)[f"{name}.png"] == ("a caption",)
