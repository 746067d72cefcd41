"""Properties that hold whatever the user writes: config values, captions, tar members, safetensors headers."""

from __future__ import annotations

import io
import json
import string
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from robustness.readers import JSON, limited, tar_bytes
from robustness.tries import leaves
from sdft.config.check import check
from sdft.config.command import compose
from sdft.config.keys import ConfigError
from sdft.config.run_folder import refuse_folder, refuse_name
from sdft.data.captions import Captions, checked_template
from sdft.data.sources.shard_index import read_shard
from sdft.data.sources.shard_urls import expand
from sdft.errors import UserError
from sdft.formats.safetensors_io import read_header

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CHECKED = compose("train", ["name=x", "run_dir=run"])
check(CHECKED)  # imports what it names, so that no example waits for that
CONFIG: Any = OmegaConf.to_container(CHECKED, resolve=True)
KEYS = sorted({"name", "trust", *(key for key, _ in leaves(CONFIG) if "_" not in key.rpartition(".")[2][:1])})
"""Every leaf of train.py's config."""
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=30)


@pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_a_word_on_the_command_line_is_a_value_or_one_sentence(examples: int) -> None:
    @settings(FEW, max_examples=examples)
    @given(st.sampled_from(KEYS), WORDS | st.floats().map(str) | st.integers().map(str))
    def attempt(key: str, value: str) -> None:
        with limited():
            try:
                check(compose("train", [f"{key}={value}"]))
            except ConfigError as error:
                assert len(str(error)) < 2000
                assert str(error).count("\n") == 0 or "\n" in value

    attempt()


@pytest.mark.parametrize("examples", [60, pytest.param(250, marks=pytest.mark.slow)])
def test_a_value_of_any_type_is_checked(examples: int) -> None:
    @settings(FEW, max_examples=examples)
    @given(key=st.sampled_from(KEYS), value=JSON)
    def attempt(key: str, value: Any) -> None:
        cfg = OmegaConf.create(json.loads(json.dumps(CONFIG, default=str)))
        with limited():
            try:
                OmegaConf.update(cfg, key, value, merge=False)
            except Exception:
                return  # OmegaConf has its own idea of what a config can hold
            try:
                check(cfg)
            except ConfigError as error:
                assert str(error)

    attempt()


@FEW
@given(st.text("{}!:.[]()<>0123456789captionsubjec _", max_size=30), WORDS)
def test_a_template_fills_in_the_caption_and_nothing_else(template: str, caption: str) -> None:
    try:
        checked = checked_template("caption", template)
    except UserError:
        return
    written = Captions((caption,), template=checked).plain
    literal = "".join(text for text, *_ in string.Formatter().parse(template))
    fields = sum(field is not None for _, field, *_ in string.Formatter().parse(template))
    assert len(written) == len(literal) + fields * len(caption)


@FEW
@given(
    st.lists(
        st.tuples(
            st.text(string.ascii_letters + "./\\ \u00e9", min_size=1, max_size=20),
            st.sampled_from([b"", b"a cat", b"\xff\xfe", b"{}", b'{"text": ["a"]}']),
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
        ),
        max_size=6,
    )
)
def test_the_members_of_a_shard_stay_in_it(tmp_path_factory: Any, members: list[tuple[str, bytes, bytes]]) -> None:
    file = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    with limited():
        try:
            entries = read_shard(file, file.name)
        except UserError as error:
            assert "x.tar" in str(error)
            return
    for entry in entries:
        assert ".." not in Path(entry.member).parts
        assert 0 <= entry.offset <= entry.offset + entry.size <= file.stat().st_size


@FEW
@given(JSON | st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.binary(max_size=60))
def test_a_header_gives_tensors_inside_of_the_file(tmp_path_factory: Any, header: Any, rest: bytes) -> None:
    file = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with limited():
        try:
            stored, metadata = read_header("in", file)
        except UserError as error:
            assert "x.safetensors" in str(error)
            return
    assert all(isinstance(value, str) for value in metadata.values())
    for tensor in stored:
        assert tensor.start >= 8 + len(text)
        assert tensor.start + tensor.num_bytes <= file.stat().st_size


@FEW
@given(st.text("{}.,0123456789az:/-", max_size=40))
def test_a_pattern_of_shards_is_expanded_or_refused(pattern: str) -> None:
    with limited():
        try:
            assert len(expand(pattern)) <= 100_000
        except UserError as error:
            assert "data.shards" in str(error)


@FEW
@given(st.text(max_size=300))
def test_a_name_of_a_run_is_a_name_of_a_file(tmp_path_factory: Any, name: str) -> None:
    try:
        refuse_name(name)
    except ConfigError:
        return
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.safetensors").write_text("x")
    assert (folder / f"{name}.safetensors").parent == folder


@FEW
@given(st.text(max_size=300))
def test_a_folder_of_a_run_can_be_made(tmp_path_factory: Any, name: str) -> None:
    base = tmp_path_factory.getbasetemp() / "folders"
    base.mkdir(exist_ok=True)
    path = f"{base}/{name.lstrip('/')}" if ".." not in name else str(base)
    try:
        refuse_folder("run_dir", path)
    except ConfigError as error:
        assert str(error).startswith("run_dir")
        return
    Path(path).mkdir(parents=True, exist_ok=True)


def test_good_shards_are_read(tmp_path: Path) -> None:
    """So that the properties above are not those of a reader that refuses all."""
    for number, content in enumerate(tar_bytes()):
        (tmp_path / f"{number}.tar").write_bytes(content)
        assert len(read_shard(tmp_path / f"{number}.tar", "x.tar")) == 3
