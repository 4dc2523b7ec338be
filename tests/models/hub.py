"""A server on this machine that answers as Hugging Face does for files."""

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

COMMIT = 'c0ffee' + 34 * '0'


@dataclass
class Hub:
    """What the server has, and what it was asked.

    Attributes:
        url: Address for ``HF_ENDPOINT``.
        files: Contents by ``(repository, file)``.
        gated: Repositories that need a login.
        cut: Send only so many bytes of a file, without saying so.
        failing: Answer everything with this status.
        unlisted: Refuse to say which files there are.
        requests: Methods and paths in order.
    """

    url: str = ''
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: int | None = None
    failing: int | None = None
    unlisted: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)


def _entries(hub: Hub, repo: str) -> Iterator[dict[str, object]]:
    for (owner, name), content in hub.files.items():
        if owner == repo:
            yield {'type': 'file', 'path': name, 'size': len(content), 'oid': '0'}


@contextlib.contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Be Hugging Face for this test, until the end of the block.

    Args:
        monkeypatch: Puts everything back after the test.
        cache: Folder for what is fetched.
    """
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path))
            path = urllib.parse.unquote(self.path).partition('?')[0].strip('/')
            tree = path.startswith('api/models/')
            repo, _, rest = path.removeprefix('api/models/').partition(
                '/tree/' if tree else '/resolve/'
            )
            revision, _, name = rest.partition('/')
            if hub.failing:
                self._refuse(hub.failing, '', 'No')
            elif repo in hub.gated:
                self._refuse(403, 'GatedRepo', f'Access to {repo} is restricted')
            elif not any(known == repo for known, _ in hub.files):
                self._refuse(401, 'RepoNotFound', 'Repository not found')
            elif revision not in ('main', COMMIT):
                self._refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
            elif tree and hub.unlisted:
                self._refuse(500, '', 'Not now')
            elif tree:
                self._send(json.dumps(list(_entries(hub, repo))).encode(), with_body)
            elif (repo, name) not in hub.files:
                self._refuse(404, 'EntryNotFound', 'Entry not found')
            else:
                self._send(hub.files[repo, name], with_body)

        def _refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            if code:
                self.send_header('X-Error-Code', code)
            self.send_header('X-Error-Message', message)
            self.send_header('X-Repo-Commit', COMMIT)
            self.send_header('Content-Length', '0')
            self.end_headers()

        def _send(self, content: bytes, with_body: bool) -> None:
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            self.send_response(206 if start else 200)
            self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header('X-Repo-Commit', COMMIT)
            if not (with_body and hub.cut is not None):
                self.send_header('Content-Length', str(len(content) - start))
            self.end_headers()
            if with_body:
                self.wfile.write(content[start : hub.cut])

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    hub.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setenv('HF_ENDPOINT', hub.url)
    thread = Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
