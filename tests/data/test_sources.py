"""Where captions and pictures are found: tables, tar shards, rows of a data set, mixtures."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data.captions import Tags
from sdft.data.scan import readable
from sdft.data.sharding import sample_names, write_shards
from sdft.data.sources import Folder, HuggingFace, Mix, Shards, metadata
from sdft.data.sources.shard_index import INDEX_SUFFIX
from sdft.data.sources.shard_urls import expand
from sdft.errors import UserError
from sdft.rng import Draws


def png(shade: int = 9) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, names: str = "a b c", captions: bool = False) -> Path:
    for shade, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(png(shade))
        if captions:
            (root / f"{name}.txt").write_text(f"caption of {name}")
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


class TestTables:
    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    def test_a_table_gives_the_captions(self, kind: str, tmp_path: Path) -> None:
        write_folder(tmp_path, "a deep/b c")
        (tmp_path / "c.txt").write_text("from the file beside it")
        rows = {"a.png": "a cat, with a comma", "deep/b.png": "собака", "c.png": "from the table"}
        if kind == "jsonl":
            lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
        else:
            lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows.items())]
        (tmp_path / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8-sig")
        source = Folder(str(tmp_path), "all", caption="{caption}!")
        found = {key: source[i].caption for i, key in enumerate(source.keys)}
        assert found == {
            "a.png": "a cat, with a comma!",
            "c.png": "from the file beside it!",
            "deep/b.png": "собака!",
        }

    def test_a_table_of_a_sub_folder_names_its_own(self, tmp_path: Path) -> None:
        write_folder(tmp_path, "one/a two/a")
        for name in ("one", "two"):
            (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": name}))
        source = Folder(str(tmp_path), "all")
        assert [source[i].caption for i in range(2)] == ["one", "two"]

    def test_several_captions_and_their_weights(self, tmp_path: Path) -> None:
        write_folder(tmp_path, "a")
        row = {"file_name": "a.png", "text": ["long", "short"], "weights": [3, 1]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        captions = Folder(str(tmp_path), "all")[0].captions
        assert (captions.texts, captions.weights) == (("long", "short"), (3.0, 1.0))
        told = [captions.draw(Draws(0, ["a"], [visit])) for visit in range(400)]
        assert 250 < told.count("long") < 350

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ('{"file_name": "a.png", "text": 3}', "line 1 has a caption that is neither text nor a list"),
            ('{"file_name": "a.png"}', "line 1 has no caption: one of text, caption, captions"),
            ('{"text": "x"}', "line 1 has no file_name"),
            ('{"file_name": "a.png", "text": " "}', "line 1 has an empty caption"),
            ('{"file_name": "gone.png", "text": "x"}', r"gone\.png is named in a table but does not exist"),
            ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "line 2 names a.png"),
            ('{"file_name": "a.png", "text": ["x"], "weights": [0]}', "line 1 has weights that are not"),
            ("{oops", "line 1 is not JSON"),
            ("[1]", "line 1 is no JSON object"),
        ],
    )
    def test_what_is_wrong_with_a_table_is_told(self, content: str, complaint: str, tmp_path: Path) -> None:
        write_folder(tmp_path)
        (tmp_path / "metadata.jsonl").write_text(content)
        with pytest.raises(UserError, match=rf"data\.root: .*metadata\.jsonl {complaint}|data\.root: .*{complaint}"):
            Folder(str(tmp_path), "all", default_caption="x")

    def test_a_parquet_table(self, tmp_path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        write_folder(tmp_path)
        columns = {"file_name": ["a.png", "b.png", "c.png"], "text": [["x"], ["y", "ja"], ["z"]], "stars": [1, 2, 3]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
        source = Folder(str(tmp_path), "all")
        assert [source[i].captions.texts for i in range(3)] == [("x",), ("y", "ja"), ("z",)]
        parquet.write_table(pyarrow.table({"file_name": ["a.png"], "text": [3]}), tmp_path / "metadata.parquet")
        with pytest.raises(UserError, match=r"metadata\.parquet row 1 has a caption that is neither text nor a list"):
            Folder(str(tmp_path), "all")
        (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(UserError, match=r"metadata\.parquet is not a parquet table \(.*\); repair or remove it"):
            Folder(str(tmp_path), "all")

    def test_a_parquet_table_needs_pyarrow(self, tmp_path: Path, monkeypatch) -> None:
        write_folder(tmp_path)
        (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match=r"metadata\.parquet needs pyarrow.*pip install -e '\.\[datasets\]'"):
            Folder(str(tmp_path), "all")


class TestShards:
    def test_a_folder_and_its_shards_are_the_same_samples(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "in", "a b/c.v2 d", captions=True)
        folder = Folder(str(tmp_path / "in"), "all", caption="{caption}, dreamy")
        shards = write_shards(folder, tmp_path / "out", per_shard=2)
        assert [path.name for path in shards] == ["000000.tar", "000001.tar"]
        source = Shards(str(tmp_path / "out" / "{000000..000001}.tar"), "all", caption="{caption}, dreamy")
        assert list(source.keys) == list(folder.keys) == ["a.png", "b/c.v2.png", "d.png"]
        for i in range(3):
            assert source[i].caption == folder[i].caption
            assert source[i].image.content() == folder[i].image.content()
            assert np.array_equal(source[i].image_HWC, folder[i].image_HWC)

    def test_the_library_webdataset_reads_them_too(self, tmp_path: Path) -> None:
        import webdataset as wds

        folder = Folder(str(write_folder(tmp_path / "in", "a b/c.v2 d", captions=True)), "all")
        write_shards(folder, tmp_path / "out", per_shard=2)
        shards = str(tmp_path / "out" / "{000000..000001}.tar")
        found = list(wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "txt"))
        assert [(key, text) for key, _, text in found] == [
            ("a", "caption of a"), ("b/c_v2", "caption of b/c.v2"), ("d", "caption of d"),
        ]

    def test_the_same_folder_gives_the_same_bytes(self, tmp_path: Path) -> None:
        folder = Folder(str(write_folder(tmp_path / "in", captions=True)), "all")
        one, two = (write_shards(folder, tmp_path / name, 9)[0].read_bytes() for name in ("one", "two"))
        assert one == two

    def test_several_captions(self, tmp_path: Path) -> None:
        row = json.dumps({"captions": ["x", "y"], "weights": [1, 2]}).encode()
        members = {"0.png": png(), "0.txt": b"plain", "0.short.txt": b"brief", "1.png": png(), "1.json": row}
        source = Shards(write_tar(tmp_path / "s.tar", members), "all")
        assert source[0].captions.texts == ("plain", "brief")
        assert (source[1].captions.texts, source[1].captions.weights) == (("x", "y"), (1.0, 2.0))
        assert source[0].caption == "plain"

    def test_an_index_is_kept_and_never_believed_of_another_file(self, tmp_path: Path) -> None:
        shard = write_tar(tmp_path / "s.tar", {"0.png": png(), "0.txt": b"one", "1.png": png(), "1.txt": b"two"})
        assert Shards(shard, "all")[0].caption == "one"
        index = Path(shard + INDEX_SUFFIX)
        kept = index.read_bytes()
        write_tar(tmp_path / "s.tar", {"0.png": png(), "0.txt": b"new", "1.png": png(), "1.txt": b"two"})
        assert Shards(shard, "all")[0].caption == "new"
        index.write_bytes(kept[:-9])
        assert Shards(shard, "all")[0].caption == "new"

    def test_braces_and_several_patterns(self) -> None:
        assert expand("a/{08..11}.tar::b.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar", "b.tar"]
        assert expand("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]

    def test_a_command_is_run_once_and_kept(self, tmp_path: Path) -> None:
        shard = write_tar(tmp_path / "s.tar", {"0.png": png(), "0.txt": b"x", "1.png": png(), "1.txt": b"y"})
        url = f"pipe:echo run >> {tmp_path}/log; cat {shard}"
        for _ in range(2):
            assert Shards(url, "all", cache_dir=str(tmp_path / "kept"))[1].caption == "y"
        assert (tmp_path / "log").read_text() == "run\n"

    def test_names_in_a_shard_are_all_different(self) -> None:
        assert sample_names(["a.png", "a.jpg", "b.c/d.e.png"]) == ["a", "a_jpg", "b_c/d_e"]
        with pytest.raises(UserError, match="would have the same name"):
            sample_names(["a.png", "a_png.png", "a_png.jpg", "a_png_jpg.png", "a.png.jpg"])


class TestHub:
    """The real library, on data sets that lie on this machine."""

    @pytest.fixture(autouse=True)
    def _own_cache(self, monkeypatch, tmp_path: Path) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
        datasets.disable_progress_bars()

    def test_a_folder_of_pictures(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "set", "a deep/b c")
        rows = [{"file_name": f"{name}.png", "text": f"of {name}"} for name in ("c", "a", "deep/b")]
        (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = HuggingFace(str(tmp_path / "set"), "all", caption="{caption}.")
        assert list(source.keys) == [f"train/{i:08d}" for i in range(3)]
        # The library orders files by name; png() draws the place among a, b, c as a shade of red.
        found = {source[i].caption: int(source[i].image_HWC[0, 0, 0]) for i in range(3)}
        assert found == {"of a.": 0, "of deep/b.": 1, "of c.": 2}
        parts = [HuggingFace(str(tmp_path / "set"), split, held_out=0.4).keys for split in ("train", "validation")]
        assert sorted(chain(*parts)) == list(source.keys)

    def test_a_saved_data_set_with_other_columns(self, tmp_path: Path) -> None:
        """Its pictures lie inside it; several captions a row."""
        import datasets

        write_folder(tmp_path / "in", "a b")
        columns = {"photo": [str(tmp_path / "in" / f"{name}.png") for name in "ab"], "said": [["x"], ["two", "zwei"]]}
        rows = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image())
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "many")
        rows.save_to_disk(tmp_path / "one")
        for file in (tmp_path / "in").iterdir():
            file.unlink()
        for name in ("many", "one"):
            source = HuggingFace(str(tmp_path / name), "all", subset="test", image="photo", text="said")
            assert [int(source[i].image_HWC[0, 0, 0]) for i in range(2)] == [0, 1]
            assert source[1].captions.every == ("two", "zwei")

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"text": "words"}, r"data\.text=words: .* has the columns image, text, number"),
            ({"image": "number"}, r"data\.image=number: this column of .* has no images"),
            ({"subset": "tset"}, r"data\.name=.*: cannot be loaded \(.*tset"),
            ({}, r"data\.name=.*: row 1 has no caption.*, row 2 has an empty caption; choose data\.text=COLUMN"),
        ],
    )
    def test_what_is_wrong_with_a_data_set_is_told(self, options, complaint: str, tmp_path: Path) -> None:
        self.saved(tmp_path, [png(), png(), png()], ["x", None, " "])
        with pytest.raises(UserError, match=complaint):
            HuggingFace(str(tmp_path / "set"), "all", **options)

    def test_rows_without_a_picture_are_named(self, tmp_path: Path) -> None:
        self.saved(tmp_path, [png(), None, b"x", png()], ["x"] * 4)
        with pytest.raises(UserError, match=r"2 files cannot be read .*set row 1 \(the row has no image\), .*row 2"):
            readable(HuggingFace(str(tmp_path / "set"), "all"))

    def saved(self, tmp_path: Path, pictures: list, texts: list) -> None:
        import datasets

        rows = [{"bytes": content, "path": None} if content else None for content in pictures]
        columns = {"image": rows, "text": texts, "number": list(range(len(rows)))}
        features = {"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int32")}
        set_ = datasets.Dataset.from_dict(columns, datasets.Features(features))
        datasets.DatasetDict({"train": set_}).save_to_disk(tmp_path / "set")

    def test_nothing_there_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data\.name=.*nowhere: cannot be loaded \("):
            HuggingFace(str(tmp_path / "nowhere"), "all")

    def test_without_the_library_the_extra_is_named(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"needs the library 'datasets'.*pip install -e '\.\[datasets\]'"):
            HuggingFace("some/set", "all")


class TestMix:
    def test_shares_become_whole_repeats(self, tiny_source) -> None:
        """20 and 4 samples at 1 : 1 are repeated 1 and 5 times, at 1 : 2 once and 10 times."""
        sources = {"many": tiny_source(20), "few": tiny_source(4, "few")}
        assert Mix(sources, weights={"many": 1, "few": 1}).repeats == {"many": 1, "few": 5}
        mix = Mix(sources, weights={"many": 1, "few": 2})
        assert mix.repeats == {"many": 1, "few": 10}
        assert len(mix.keys) == len(set(mix.keys)) == 60

    def test_each_source_keeps_its_captions_and_weight(self, tmp_path: Path) -> None:
        root = str(write_folder(tmp_path, captions=True))
        own = Folder(root, "all", caption="{caption}, zorbix", tags=Tags(shuffle=True))
        mix = Mix({"own": own, "others": Folder(root, "all", loss_weight=0.3)})
        assert (mix[0].caption, mix[0].loss_weight) == ("caption of a, zorbix", 1.0)
        assert (mix[3].caption, mix[3].loss_weight) == ("caption of a", 0.3)
        assert mix[0].captions.tags.shuffle
        assert mix.stored(4).read() == own.stored(1).read()

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"weights": {"a": 1}}, r"data\.weights lacks \['b'\]"),
            ({"weights": {"a": 1, "c": 1}}, r"data\.weights names \['c'\]"),
            ({"weights": {"a": 1, "b": 1}, "repeats": {"a": 2}}, "set one of them"),
        ],
    )
    def test_what_says_too_little_or_too_much(self, options, complaint: str, tiny_source) -> None:
        with pytest.raises(UserError, match=complaint):
            Mix({"a": tiny_source(1), "b": tiny_source(1)}, **options)


def test_table_columns_have_several_names() -> None:
    assert metadata.texts_of({"caption": "x"}) == metadata.texts_of({"captions": ["x"]}) == (("x",), ())
