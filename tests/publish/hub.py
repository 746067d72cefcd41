"""A stand-in for the Hub on this machine: what the installed client asks of it when it uploads a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REGULAR = (".md", ".json", ".txt")


class Hub:
    """What was asked of it, and the files of the last commit.

    refuse: path -> status and message that it is answered with.
    """

    def __init__(self, address: str):
        self.address = address
        self.asked: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.refuse: dict[str, tuple[int, str]] = {}

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        self.asked.append((method, path))
        if path.startswith(("/api/repos/", "/api/models/")):
            self.tokens.add(token)
        if path in self.refuse:
            status, message = self.refuse[path]
            return status, {"error": message}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/{self.created['organization']}/{self.created['name']}"}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["regular" if file.endswith(REGULAR) else "lfs" for file in files]
            return 200, {
                "files": [
                    {"path": file, "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.address}/storage/{one['oid']}"}} for one in objects]
            return 200, {
                "transfer": "basic",
                "objects": [{**one, "actions": action} for one, action in zip(objects, actions, strict=True)],
            }
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            address = f"{self.address}/{repository}/commit/{'1' * 40}"
            return 200, {"commitUrl": address, "commitOid": "1" * 40, "success": True}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return 404, {"error": "not there"}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        self.files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]


@contextmanager
def running_hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = hub.answer(self.command, self.path.split("?")[0], body, self.headers.get("Authorization"))
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, *_: Any) -> None:
            """Nothing: not into the output of the tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
