"""A model hub of a few lines, on localhost: one repository at one commit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves OWNER/NAME from a folder; `asked` are the files that were downloaded."""

    daemon_threads = True

    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.folder = repository, folder
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        api = f"/api/models/{self.server.repository}"
        if self.path.startswith(f"{api}/tree/"):
            self._tree()
        elif self.path.startswith(api):
            self._info()
        else:
            self._file(body=True)

    def _tree(self) -> None:
        files = [path for path in self.server.folder.rglob("*") if path.is_file()]
        listed = [
            {
                "type": "file",
                "path": path.relative_to(self.server.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in files
        ]
        self._answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _info(self) -> None:
        files = sorted(
            path.relative_to(self.server.folder).as_posix() for path in self.server.folder.rglob("*") if path.is_file()
        )
        siblings = [{"rfilename": file} for file in files]
        answer = {"id": self.server.repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        self._answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, body: bool) -> None:
        prefix = f"/{self.server.repository}/resolve/{COMMIT}/"
        path = self.server.folder / unquote(self.path.removeprefix(prefix).split("?")[0])
        if not self.path.startswith(prefix) or not path.is_file():
            self._answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)
            return
        content = path.read_bytes()
        if body:
            self.server.asked.append(path.relative_to(self.server.folder).as_posix())
        headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._answer(content, headers, body=body)

    def _answer(self, content: bytes, headers: dict[str, str], status: int = 200, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(repository: str, folder: Path) -> Iterator[Hub]:
    with Hub(repository, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
