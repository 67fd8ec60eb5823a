"""A real Jupyter server with our contents manager beside one without, asked over REST."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from jupyter_programs import PATIENCE_SECONDS, TOKEN, Home, Server
from nbformat.v4 import new_notebook, new_output

from sandbox_provisioner.app.server import set_up_server

pytestmark = pytest.mark.requires("userns", "jupyter_server")

KEPT = "alias ls=ls\n"
PLANT = """
import os
os.path.exists("nb.ipynb") and os.unlink("nb.ipynb")
os.symlink("../.bashrc", "nb.ipynb")
os.symlink("../.bashrc", "download.txt")
os.mkfifo("fifo.txt")
print(os.readlink("nb.ipynb"))
"""


def started(home: Home, *, with_ours: bool) -> Server:
    home.add_kernel("boxed", mem_limit="512M")
    if with_ours:
        set_up_server(home.config, replace=False)
    # The trash would be in a home directory of its own; what is deleted here shall be gone.
    return Server(home, more={"FileContentsManager.delete_to_trash": "False"})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Home() as home:
        server = started(home, with_ours=True)
        yield server
        server.end()


@pytest.fixture(scope="module")
def control() -> Iterator[Server]:
    with Home() as home:
        server = started(home, with_ours=False)
        yield server
        server.end()


def poisoned() -> dict[str, Any]:
    """A notebook of which a shell would run an output."""
    notebook = new_notebook()
    notebook.metadata["$(touch /tmp/owned)"] = [new_output("stream", text="$(id)")]
    return {"type": "notebook", "format": "json", "content": notebook}


def get_file(server: Server, path: str) -> requests.Response:
    headers = {"Authorization": f"token {TOKEN}"}
    url = f"{server.url}/files/{path}"
    return requests.get(url, headers=headers, timeout=PATIENCE_SECONDS)


def plant(server: Server) -> Path:
    """What a kernel leaves: a link in its notebook's place. The file that it leads to."""
    startup = server.home.path / ".bashrc"
    startup.write_text(KEPT)
    assert server.ask("PUT", "contents/nb.ipynb", poisoned()).status_code == 201
    with server.session("boxed", "nb.ipynb") as client:
        assert client.run(PLANT) == "../.bashrc\n"
    return startup


def test_a_link_in_a_notebooks_place_is_neither_written_nor_read(server: Server) -> None:
    startup = plant(server)
    asked = (
        server.ask("PUT", "contents/nb.ipynb", poisoned()),
        server.ask("POST", "contents/nb.ipynb/checkpoints"),
        server.ask("POST", "contents/nb.ipynb/checkpoints/checkpoint"),
        server.ask("POST", "contents", {"copy_from": "download.txt"}),
        server.ask("GET", "contents/download.txt"),
    )
    for answer in asked:
        assert answer.status_code == 403, answer.text
        assert "symbolic link, which code in a kernel may have put there" in answer.text
    assert get_file(server, "download.txt").status_code == 403
    assert server.ask("GET", "contents/fifo.txt").status_code == 400
    assert startup.read_text() == KEPT
    names = {model["name"] for model in server.ask("GET", "contents").json()["content"]}
    assert {"nb.ipynb", "download.txt"} <= names
    assert server.ask("DELETE", "contents/nb.ipynb").status_code == 204
    assert server.ask("PUT", "contents/nb.ipynb", poisoned()).status_code == 201
    assert startup.read_text() == KEPT


def test_without_ours_the_same_link_is_written_through(control: Server) -> None:
    """What the test before this one has to hold against."""
    startup = plant(control)
    assert control.ask("PUT", "contents/nb.ipynb", poisoned()).ok
    assert "$(touch /tmp/owned)" in startup.read_text()


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "file", "format": "text", "content": content, **more}


USE: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "contents", {"type": "notebook"}),
    ("PUT", "contents/Untitled.ipynb", poisoned()),
    ("GET", "contents/Untitled.ipynb?hash=1", None),
    ("GET", "contents/Untitled.ipynb/checkpoints", None),
    ("POST", "contents/Untitled.ipynb/checkpoints", None),
    ("POST", "contents/Untitled.ipynb/checkpoints/checkpoint", None),
    ("POST", "contents/Untitled.ipynb/trust", None),
    ("PATCH", "contents/Untitled.ipynb", {"path": "named.ipynb"}),
    ("GET", "contents/named.ipynb/checkpoints", None),
    ("POST", "contents", {"type": "directory"}),
    ("PUT", "contents/Untitled Folder/deep", {"type": "directory"}),
    ("PUT", "contents/Untitled Folder/deep/a.txt", text("one")),
    ("PUT", "contents/big.txt", text("x" * (8 << 20), chunk=1)),
    ("PUT", "contents/big.txt", text("y" * (8 << 20), chunk=2)),
    ("PUT", "contents/big.txt", text("end", chunk=-1)),
    ("PUT", "contents/bytes.bin", {"type": "file", "format": "base64", "content": "AP8="}),
    ("GET", "contents/bytes.bin", None),
    ("POST", "contents", {"copy_from": "big.txt"}),
    ("POST", "contents/Untitled Folder", {"copy_from": "named.ipynb"}),
    ("PUT", "contents/to", {"type": "directory"}),
    ("POST", "contents/to", {"copy_from": "Untitled Folder"}),
    ("GET", "contents/to/Untitled Folder/deep", None),
    ("PATCH", "contents/to", {"path": "from"}),
    ("PATCH", "contents/from", {"path": "big.txt"}),
    ("GET", "contents/nothing.txt", None),
    ("PUT", "contents/nowhere/a.txt", text("one")),
    ("PUT", "contents/.hidden", text("one")),
    ("DELETE", "contents/from", None),
    ("DELETE", "contents/named.ipynb", None),
    ("DELETE", "contents/named.ipynb", None),
    ("GET", "contents", None),
)
_OF_A_MOMENT = {
    "created",
    "last_modified",
    "size",
    "message",
    "reason",
    "traceback",
    "short_message",
}


def used(server: Server) -> list[tuple[str, int, Any]]:
    """What a person's acts are answered with, but for times, sizes of directories and sentences."""
    answers: list[tuple[str, int, Any]] = []
    for method, path, body in USE:
        answer = server.ask(method, path, body)
        found = answer.json() if answer.text.startswith(("{", "[")) else None
        answers.append((f"{method} {path}", answer.status_code, lasting(found)))
    return answers


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(part) for key, part in value.items() if key not in _OF_A_MOMENT}
    if isinstance(value, list):
        parts = [lasting(part) for part in value]
        return sorted(parts, key=lambda part: part.get("path", "")) if _is_listing(parts) else parts
    return value


def _is_listing(parts: list[Any]) -> bool:
    return all(isinstance(part, dict) and "path" in part for part in parts)


def test_all_else_is_answered_as_jupyter_server_does(server: Server, control: Server) -> None:
    for one in (server, control):
        for path in one.home.notebooks.iterdir():
            if not path.is_dir():
                path.unlink()
    ours, theirs = used(server), used(control)
    for one, other in zip(ours, theirs, strict=True):
        assert one == other
    assert [code for _, code, _ in ours].count(201) > 10
    for name in ("big.txt", "bytes.bin"):
        one, other = get_file(server, name), get_file(control, name)
        assert (one.status_code, one.content) == (200, other.content)
        assert one.headers["Content-Type"] == other.headers["Content-Type"]
    assert len(one.content) == 2
    tree = [sorted(str(p.relative_to(s.home.notebooks)) for p in s.home.notebooks.rglob("*"))
            for s in (server, control)]  # fmt: skip
    assert tree[0] == tree[1]
