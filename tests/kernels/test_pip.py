"""A cell installs a package from where this machine gets its own, and imports it."""

from __future__ import annotations

import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from warmth import came_from, made, spares

from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns")

NAME = socket.gethostname()
WHEEL = "tiny_thing-1.0-py3-none-any.whl"
INSTALL = "!pip install tiny-thing\nimport tiny_thing\nprint(tiny_thing.__file__)"


def wheel() -> bytes:
    """As small as can be."""
    info = "tiny_thing-1.0.dist-info"
    files = {
        "tiny_thing.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


PAGES = {
    "/simple/tiny-thing/": f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode(),
    f"/files/{WHEEL}": wheel(),
}


class Index(BaseHTTPRequestHandler):
    """An index with one project, which has one file."""

    def do_GET(self) -> None:
        page = PAGES.get(self.path)
        self.send_response(200 if page else 404)
        self.send_header("Content-Type", "text/html" if self.path[-1] == "/" else "application/zip")
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *words: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Of a kernel whose machine has an index of its own. It is this very machine, which a preset
    does not open: so a rule of addresses names it too."""
    address = socket.gethostbyname(NAME)
    server = ThreadingHTTPServer((address, 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{NAME}:{port}/simple")
    monkeypatch.setenv("PIP_TRUSTED_HOST", NAME)
    yield {"network": "gateway", "network_allow": ["packages", f"{address}/32:{port}"]}
    server.shutdown()
    server.server_close()


def in_each_kind(warm: Any, runtime_dir: Path, options: dict[str, Any]) -> None:
    found = []
    with warm(**options) as k:
        found.append(k.run(INSTALL))
    ahead.wait()
    nursery = made(runtime_dir)
    with warm(**options, spares=1) as k:
        assert came_from(k) == nursery.sandbox_id
        found.append(k.run(INSTALL))
    ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(**options) as k:
        assert k.provisioner.handle.record.group == spare.sandbox_id
        found.append(k.run(INSTALL))
    for text in found:
        assert "Successfully installed tiny-thing-1.0" in text, text
        assert text.rstrip().endswith("/site-packages/tiny_thing.py"), text
        assert "/home/jovyan/.local/lib/" in text, text


def test_what_a_cell_installs_is_there_in_cold_and_warm_kernels_and_spares(
    warm: Any, runtime_dir: Path, options: dict[str, Any]
) -> None:
    in_each_kind(warm, runtime_dir, options)


@pytest.mark.ordinary_user
def test_the_same_in_an_ordinary_users(
    warm: Any, runtime_dir: Path, options: dict[str, Any]
) -> None:
    in_each_kind(warm, runtime_dir, {**options, "pids_limit": None})


def test_what_no_rule_has_is_no_index(kernel: Any, options: dict[str, Any]) -> None:
    with kernel(**{**options, "network_allow": ["other.example"]}) as k:
        text = k.run("!pip install --retries 0 --timeout 5 tiny-thing")
    assert "No matching distribution" in text
    assert "was refused: this kernel's network allows other.example" in " ".join(text.split())
