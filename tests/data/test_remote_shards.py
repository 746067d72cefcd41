"""Shards on a server of this machine that is slow, breaks off, refuses, or tells untruths."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data.datamodule import Images
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Shards, shard_copies
from sdft.data.sources.shard_copies import MAY_FETCH, named
from sdft.errors import UserError


class Server:
    """Serves a folder. `trouble` maps a file name to what goes wrong at its first requests, one after another."""

    def __init__(self, folder: Path):
        self.folder, self.trouble = folder, {}
        self.pause, self.answering = 0.0, False
        """seconds between the halves of each answer, and whether one is on its way"""
        self.requests: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.requests[name] += 1
                file = server.folder / name
                waiting = server.trouble.get(name)
                if waiting:
                    waiting.pop(0)(self, file.read_bytes())
                elif file.is_file():
                    server.answering = server.pause > 0
                    answer(self, file.read_bytes(), pause=server.pause)
                    server.answering = False
                else:
                    self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


Trouble = Callable[[BaseHTTPRequestHandler, bytes], None]


def answer(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None, pause: float = 0.0) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    half = len(content) // 2
    handler.wfile.write(content[:half])
    handler.wfile.flush()
    time.sleep(pause)
    handler.wfile.write(content[half:])


def cut_off(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    answer(handler, content[: len(content) // 2], len(content))


def too_short(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """A length that is wrong, and the file cut there."""
    answer(handler, content, length=1536)


def flipped(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    answer(handler, content[:700] + bytes([content[700] ^ 1]) + content[701:])


def a_page(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    answer(handler, b"<html>Please log in</html>")


def busy(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(503)


def slow(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    for first in range(0, len(content), 8192):
        handler.wfile.write(content[first : first + 8192])
        time.sleep(0.01)


def stalled(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content[:600])
    handler.wfile.flush()
    time.sleep(3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three shards, and their folder."""
    root = tmp_path_factory.mktemp("set")
    (root / "pictures").mkdir()
    g = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(g.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / "pictures" / f"{i:02d}.png")
        (root / "pictures" / f"{i:02d}.txt").write_text(f"picture {i}")
    write_shards(Folder(str(root / "pictures"), "all"), root / "shards", per_shard=4)
    return root


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    serving = Server(shards / "shards")
    yield serving
    serving.server.shutdown()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_copies, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(shard_copies, "STALLED_AFTER", 0.5)


def remote(server: Server, folder: Path, **options) -> Shards:
    return Shards(f"{server.url}/{{000000..000002}}.tar", "all", cache_dir=str(folder), **options)


def assert_same(source: Shards, folder: Folder) -> None:
    assert list(source.keys) == list(folder.keys)
    for i in range(len(folder.keys)):
        assert source[i].caption == folder[i].caption
        assert source[i].image.content() == folder[i].image.content()


@pytest.mark.parametrize("trouble", [cut_off, too_short, a_page, busy, slow, stalled, None])
def test_what_goes_wrong_once_is_tried_again(
    trouble: Trouble | None, server: Server, shards: Path, tmp_path: Path
) -> None:
    server.trouble = {"000001.tar": [trouble, trouble]} if trouble else {}
    assert_same(remote(server, tmp_path), Folder(str(shards / "pictures"), "all"))
    assert server.requests["000000.tar"] == 1
    assert server.requests["000001.tar"] == {None: 1, slow: 1}.get(trouble, 3)


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        (cut_off, r"status 18 \(curl: \(18\) .*\)\), after 3 tries"),
        (too_short, r"\(is not a whole tar file \(.*\).*\), after 3 tries"),
        (a_page, r"\(is not a whole tar file \(.*\).*\), after 3 tries"),
        (busy, r"returned error: 503\)\), after 3 tries"),
        (stalled, r"\(nothing arrived for 0\.5 s\), after 3 tries"),
    ],
)
def test_a_shard_that_fails_is_named_after_the_retries(
    trouble: Trouble, complaint: str, server: Server, tmp_path: Path
) -> None:
    server.trouble = {"000001.tar": [trouble] * 9}
    with pytest.raises(UserError, match=rf"data\.shards={server.url}/000001\.tar: cannot be fetched .*{complaint}"):
        remote(server, tmp_path, retries=2)
    kept = [file for file in (tmp_path / "shards_partial").iterdir() if file.suffix != ".lock"]
    assert not kept, "nothing half is left"
    server.trouble = {}
    assert len(remote(server, tmp_path).keys) == 12
    assert server.requests["000000.tar"] <= 2


def test_what_is_not_there_is_told_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: cannot be fetched .*returned error: 404\)\)$"):
        Shards(f"{server.url}/gone.tar", "all", cache_dir=str(tmp_path))
    assert server.requests["gone.tar"] == 1


def test_no_message_has_a_password_or_a_signature(server: Server, tmp_path: Path) -> None:
    url = server.url.replace("http://", "http://me:secret@") + "/gone.tar?X-Amz-Signature=secret"
    with pytest.raises(UserError) as told:
        Shards(url, "all", cache_dir=str(tmp_path))
    assert f"data.shards={server.url}/gone.tar?...: cannot be fetched" in str(told.value)
    assert "secret" not in str(told.value)


def test_copies_and_indexes_are_kept(server: Server, tmp_path: Path) -> None:
    first = remote(server, tmp_path)
    stamps = [first.stored(i).stamp() for i in range(12)]
    server.server.shutdown()
    server.server.server_close()
    again = remote(server, tmp_path)
    assert [again.stored(i).stamp() for i in range(12)] == stamps, "so nothing is scanned again"
    assert [again[i].image.content() for i in range(12)] == [first[i].image.content() for i in range(12)]


def test_a_damaged_copy_without_an_index_is_named(server: Server, tmp_path: Path) -> None:
    """As earlier versions may have left it."""
    source = remote(server, tmp_path)
    shard, copies = source.shards[0].shard, source.shards[0].copies
    copies.index(shard).unlink()
    copy = copies.path(shard)
    copy.write_bytes(copy.read_bytes()[:700])
    with pytest.raises(UserError, match=rf"data\.cache_dir: {copy}, the copy of .*000000\.tar, is not a .*remove it"):
        remote(server, tmp_path)


def test_copies_stay_below_the_limit_and_come_again(server: Server, shards: Path, tmp_path: Path) -> None:
    """Room for two of the three shards."""
    size = (shards / "shards" / "000000.tar").stat().st_size
    source = remote(server, tmp_path, cache_limit_gb=2.5 * size / 1e9)
    folder = Folder(str(shards / "pictures"), "all")
    for _ in range(2):
        assert_same(source, folder)
        kept = [file.stat().st_size for file in (tmp_path / "shards").iterdir()]
        assert len(kept) == 2
        assert sum(kept) <= 2.5 * size
    assert sum(server.requests.values()) > 3


def test_a_limit_below_one_shard_is_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_limit_gb=1e-06: a shard of .* GB is larger"):
        remote(server, tmp_path, cache_limit_gb=1e-6)


def test_a_shard_that_changed_is_an_error(server: Server, shards: Path, tmp_path: Path) -> None:
    """It would end in other pictures under the same names."""
    source = remote(server, tmp_path)
    (tmp_path / "shards" / source.shards[0].copies.path(source.shards[0].shard).name).unlink()
    server.trouble = {"000000.tar": [flipped]}
    with pytest.raises(UserError, match=r"000000\.tar: is another file than .*index\.jsonl to take it"):
        source[0].image.content()
    assert source[0].image.content(), "and the right one is taken"


def test_a_list_states_sizes_and_checksums(server: Server, shards: Path, tmp_path: Path) -> None:
    content = json.loads((shards / "shards" / "shards.json").read_text())
    assert content["__kind__"] == "wids-shard-index-v1"
    for row in content["shardlist"]:
        bytes_ = (shards / "shards" / row["url"]).read_bytes()
        assert (row["filesize"], row["md5sum"], row["nsamples"]) == (len(bytes_), hashlib.md5(bytes_).hexdigest(), 4)
        row["url"], row["md5sum"] = f"{server.url}/{row['url']}", row["md5sum"].upper()
    (tmp_path / "list.json").write_text(json.dumps(content))
    server.trouble = {"000002.tar": [flipped]}
    source = Shards(str(tmp_path / "list.json"), "all", cache_dir=str(tmp_path))
    assert_same(source, Folder(str(shards / "pictures"), "all"))
    assert server.requests["000002.tar"] == 2, "the flipped bit was found"
    assert_same(Shards(str(shards / "shards" / "shards.json"), "all"), Folder(str(shards / "pictures"), "all"))
    there = Shards(f"{server.url}/shards.json", "all", cache_dir=str(tmp_path / "there"))
    assert_same(there, Folder(str(shards / "pictures"), "all"))
    with pytest.raises(UserError, match=r"gone\.json: cannot be fetched \(.*404"):
        named(f"{server.url}/gone.json")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no list of shards"),
        ("[1]", "is no list of shards"),
        ('{"shardlist": [{"filesize": 3}]}', "is no list of shards"),
        (
            '{"shardlist": [{"url": "a.tar", "filesize": "3"}]}',
            "has a shard without a url, or with a size that is no number",
        ),
        ('{"shardlist": [{"url": "a.tar", "filesize": true}]}', "has a shard without a url, or with a size that is no"),
        ('{"shardlist": [{"url": "pipe:touch x"}]}', r"has 'pipe:touch x', and lists may name files and http, "),
        ('{"shardlist": [{"url": "PIPE:touch x"}]}', r"has 'PIPE:touch x', and lists may name"),
        (r'{"shardlist": [{"url": "pi\tpe:touch x"}]}', r"has 'pi\\tpe:touch x', and lists may name"),
        (r'{"shardlist": [{"url": "\u0001pipe:touch x"}]}', r"has '\\x01pipe:touch x', and lists may name"),
        ('{"shardlist": [{"url": " pipe:touch x"}]}', r"has ' pipe:touch x', and lists may name|there is no file"),
        ('{"shardlist": [{"url": "http://[bad"}]}', r"has 'http://\[bad', and lists may name"),
        ("[" * 100_000, "is no list of shards"),
    ],
)
def test_lists_that_are_none_or_run_commands_are_refused(
    content: str, complaint: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "list.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data\.shards=.*list\.json: {complaint}|{complaint}"):
        Shards("list.json", "all", cache_dir=str(tmp_path), retries=0)
    assert not (tmp_path / "x").exists()


def test_nothing_is_fetched_in_a_dry_run(server: Server, tmp_path: Path) -> None:
    token = MAY_FETCH.set(False)
    try:
        with pytest.raises(UserError, match="dry_run=true runs no commands and fetches nothing"):
            remote(server, tmp_path)
        assert not server.requests
        MAY_FETCH.reset(token)
        remote(server, tmp_path)
        token = MAY_FETCH.set(False)
        assert len(remote(server, tmp_path).keys) == 12
    finally:
        MAY_FETCH.reset(token)


@pytest.mark.parametrize(
    ("url", "tool"), [("s3://bucket/a.tar", "aws"), ("gs://bucket/a.tar", "gsutil"), ("https://host/a.tar", "curl")]
)
def test_buckets_are_read_by_their_tools(url: str, tool: str, shards: Path, tmp_path: Path, monkeypatch) -> None:
    """A stand-in for each program that answers with a shard if it is called as the real one is."""
    words = {"aws": f"s3 cp {url} -", "gsutil": f"cat {url}"}.get(tool)
    program = tmp_path / "bin" / tool
    program.parent.mkdir()
    check = f'[ "$*" = "{words}" ] || {{ echo "called with $*" >&2; exit 9; }}' if words else ""
    program.write_text(f"#!/bin/sh\n{check}\nexec cat {shards}/shards/000000.tar\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert list(Shards(url, "all", cache_dir=str(tmp_path)).keys) == [f"{i:02d}.png" for i in range(4)]


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"s3://b/a\.tar: cannot be fetched \(aws is not installed\)$"):
        Shards("s3://b/a.tar", "all", cache_dir=str(tmp_path), retries=0)


def test_a_remote_shard_needs_a_folder_for_its_copy(server: Server) -> None:
    with pytest.raises(UserError, match=r"000000\.tar: set data\.cache_dir=DIR"):
        Shards(f"{server.url}/{{000000..000002}}.tar", "all")


class TestOrder:
    """A set larger than the space for its copies is read a few shards at a time."""

    def test_a_pass_reads_each_shard_once(self, server: Server, shards: Path, tmp_path: Path) -> None:
        from sdft.data.order import BatchOrder, ShardWindows

        numbers = np.repeat(np.arange(6), 10)
        order = BatchOrder(60, 5, seed=0, start=0, stop=24, windows=ShardWindows(numbers, 2, 0))
        batches = [[numbers[index] for index, _ in batch] for batch in order]
        windows = [sorted({n for batch in batches[i : i + 4] for n in batch}) for i in range(0, 24, 4)]
        assert all(len(window) == 2 for window in windows)
        for a_pass in (windows[:3], windows[3:]):
            assert sorted(chain.from_iterable(a_pass)) == list(range(6))
        assert windows[:3] != windows[3:], "each pass has another order"
        plain = BatchOrder(60, 5, seed=0, start=0, stop=24)
        seen = [item for batch in order for item in batch]
        assert sorted(seen) == sorted(item for batch in plain for item in batch), "and nothing is dropped"
        later = BatchOrder(60, 5, seed=0, start=7, stop=24, windows=ShardWindows(numbers, 2, 0))
        assert list(later) == list(order)[7:], "resuming continues the order"

    def test_shards_come_before_they_are_read(self, server: Server, shards: Path, tmp_path: Path) -> None:
        """The space is that of two shards; none is fetched while its picture is waited for, but for the first."""
        from types import SimpleNamespace

        size = (shards / "shards" / "000000.tar").stat().st_size
        source = remote(server, tmp_path, cache_limit_gb=2.5 * size / 1e9)
        data = Images(source, source, 2, 32, cache="off", shuffle_shards=1, cache_dir=str(tmp_path))
        data.trainer = SimpleNamespace(max_steps=12, accumulate_grad_batches=1, global_rank=0, world_size=1)
        seen = Counter(key for batch in data.train_dataloader() for key in batch.keys)
        assert set(seen.values()) == {2}
        assert len(seen) == 12

    def test_without_shards_it_is_refused(self, shards: Path) -> None:
        source = Folder(str(shards / "pictures"), "all")
        with pytest.raises(UserError, match=r"data\.shuffle_shards=2: the data has no shards"):
            Images(source, source, 2, 32, shuffle_shards=2)

    def test_a_set_that_does_not_fit_needs_it(self, server: Server, shards: Path, tmp_path: Path) -> None:
        size = (shards / "shards" / "000000.tar").stat().st_size
        source = remote(server, tmp_path, cache_limit_gb=2.5 * size / 1e9)
        with pytest.raises(UserError, match=r"data\.cache_limit_gb: .*set data\.shuffle_shards=1"):
            Images(source, source, 2, 32, cache="off", cache_dir=str(tmp_path))
        Images(source, source, 2, 32, cache="ram", cache_dir=str(tmp_path))
