"""test_contents.py - in the test process: the contents manager on directories with planted links.

The same attempts are made on jupyter_server's own manager, as a control: what cannot succeed there
shows nothing here.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from facilities import missing

if missing("jupyter_server"):
    pytest.skip(missing("jupyter_server"), allow_module_level=True)

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbformat.sign import MemorySignatureStore, NotebookNotary
from nbformat.v4 import new_notebook
from tornado.web import HTTPError
from traitlets.config import Config, Configurable

from sandbox_provisioner.contents import SandboxContentsManager
from sandbox_provisioner.contents.beneath import Beneath, move

Manager = AsyncLargeFileManager
Act = Callable[[Manager], Awaitable[Any]]
KEPT = "a person's own"
_RENAME_EXCHANGE = 2
_ROUNDS = 200
_MOST_ROUNDS = 20_000


def run(awaitable: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await awaitable

    return asyncio.run(wait())


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory that the server's root is beside of, with a file."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(KEPT)
    return folder


@pytest.fixture
def root(tmp_path: Path, outside: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def made(kind: type[Manager], root: Path) -> Manager:
    """One that keeps its signatures of notebooks in memory."""
    manager = kind(root_dir=str(root), delete_to_trash=False)
    manager.notary = NotebookNotary(
        parent=manager, store_factory=MemorySignatureStore, secret=b"secret"
    )
    return manager


@pytest.fixture(params=[SandboxContentsManager, AsyncLargeFileManager], ids=["ours", "control"])
def either(request: pytest.FixtureRequest, root: Path) -> Manager:
    return made(request.param, root)


@pytest.fixture
def manager(root: Path) -> Manager:
    return made(SandboxContentsManager, root)


def notebook() -> dict[str, Any]:
    return {"type": "notebook", "content": new_notebook()}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "file", "content": content, "format": "text", **more}


def state_of(folder: Path) -> dict[str, str]:
    """Names and contents of all below."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "" for p in paths}


# -- what leads out is neither written, removed, moved nor read


def plant_file(root: Path, outside: Path) -> None:
    (root / "x").symlink_to("../outside/file")
    (root / "x.ipynb").symlink_to("../outside/file")


def plant_folder(root: Path, outside: Path) -> None:
    (root / "d").symlink_to(outside)
    (root / "mine").write_text("mine")


def plant_checkpoint(root: Path, outside: Path) -> None:
    (root / "x").write_text("planted")
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints/x-checkpoint").symlink_to("../../outside/file")


def plant_checkpoints(root: Path, outside: Path) -> None:
    (root / "x").write_text("planted")
    (root / ".ipynb_checkpoints").symlink_to(outside)


WRITES: dict[str, tuple[Callable[[Path, Path], None], Act]] = {
    "save a notebook": (plant_file, lambda m: m.save(notebook(), "x.ipynb")),
    "save a file": (plant_file, lambda m: m.save(text("new"), "x")),
    "begin an upload": (plant_file, lambda m: m.save(text("new", chunk=1), "x")),
    "go on with an upload": (plant_file, lambda m: m.save(text("new", chunk=2), "x")),
    "end an upload": (plant_file, lambda m: m.save(text("new", chunk=-1), "x")),
    "save below": (plant_folder, lambda m: m.save(text("new"), "d/file")),
    "make a notebook below": (plant_folder, lambda m: m.new_untitled("d", ext=".ipynb")),
    "make a directory below": (plant_folder, lambda m: m.save({"type": "directory"}, "d/new")),
    "delete below": (plant_folder, lambda m: m.delete("d/file")),
    "rename below": (plant_folder, lambda m: m.rename("d/file", "d/other")),
    "move out": (plant_folder, lambda m: m.rename("mine", "d/mine")),
    "move in": (plant_folder, lambda m: m.rename("d/file", "file")),
    "copy out": (plant_folder, lambda m: m.copy("mine", "d")),
    "make a checkpoint": (plant_checkpoint, lambda m: m.create_checkpoint("x")),
    "make a checkpoint elsewhere": (plant_checkpoints, lambda m: m.create_checkpoint("x")),
}


@pytest.mark.parametrize("act", WRITES)
def test_nothing_outside_is_changed_through_a_link(
    act: str, either: Manager, root: Path, outside: Path
) -> None:
    plant, attempt = WRITES[act]
    plant(root, outside)
    before = state_of(outside)
    if isinstance(either, SandboxContentsManager):
        with pytest.raises(HTTPError, match=r"symbolic link.*not followed") as refused:
            run(attempt(either))
        assert refused.value.status_code == 403
        assert state_of(outside) == before
    else:
        run(attempt(either))
        assert state_of(outside) != before


def plant_tree(root: Path, outside: Path) -> None:
    (root / "tree").mkdir()
    (root / "tree/x").symlink_to(outside / "file")


def plant_restored(root: Path, outside: Path) -> None:
    plant_checkpoint(root, outside)
    os.utime(root / "x")


READS: dict[str, tuple[Callable[[Path, Path], None], Act]] = {
    "read a file": (plant_file, lambda m: m.get("x", type="file")),
    "read below": (plant_folder, lambda m: m.get("d/file")),
    "list": (plant_folder, lambda m: m.get("d")),
    "copy a file": (plant_file, lambda m: m.copy("x")),
    "copy from below": (plant_folder, lambda m: m.copy("d/file", "copied")),
    "copy a directory": (plant_folder, lambda m: m.copy("d", "copied")),
    "restore a checkpoint": (plant_restored, lambda m: m.restore_checkpoint("checkpoint", "x")),
}


@pytest.mark.parametrize("act", READS)
def test_nothing_outside_is_read_through_a_link(
    act: str, either: Manager, root: Path, outside: Path
) -> None:
    plant, attempt = READS[act]
    plant(root, outside)
    if isinstance(either, SandboxContentsManager):
        before = state_of(root)
        with pytest.raises(HTTPError, match=r"symbolic link.*not followed") as refused:
            run(attempt(either))
        assert refused.value.status_code == 403
        assert state_of(root) == before
    else:
        run(attempt(either))


def test_a_copied_directory_has_links_where_the_other_has(
    either: Manager, root: Path, outside: Path
) -> None:
    plant_tree(root, outside)
    (root / "tree/deep").mkdir()
    (root / "tree/deep/file").write_text("content")
    os.mkfifo(root / "tree/deep/fifo") if isinstance(either, SandboxContentsManager) else None
    (root / "to").mkdir()
    run(either.copy("tree", "to"))
    copied = root / "to/tree"
    assert (copied / "deep/file").read_text() == "content"
    assert not (copied / "deep/fifo").exists()
    assert (copied / "x").is_symlink() is isinstance(either, SandboxContentsManager)


def test_a_link_to_a_hidden_file_is_neither_read_nor_written(either: Manager, root: Path) -> None:
    """The root directory is a home, and the link does not leave it."""
    (root / ".bashrc").write_text(KEPT)
    (root / "x").symlink_to(".bashrc")
    if isinstance(either, SandboxContentsManager):
        for attempt in (either.get("x"), either.copy("x"), either.save(text("$(id)"), "x")):
            with pytest.raises(HTTPError, match=r"symbolic link.*not followed"):
                run(attempt)
        assert (root / ".bashrc").read_text() == KEPT
    else:
        assert run(either.get("x"))["content"] == KEPT
        run(either.save(text("$(id)"), "x"))
        assert (root / ".bashrc").read_text() == "$(id)"


def test_hidden_files_are_read_by_links_where_the_server_shows_them(root: Path) -> None:
    (root / ".notes").write_text(KEPT)
    (root / "x").symlink_to(".notes")
    manager = SandboxContentsManager(root_dir=str(root), allow_hidden=True)
    assert run(manager.get("x"))["content"] == KEPT


def test_nothing_outside_is_read_where_the_server_shows_hidden_files(
    root: Path, outside: Path
) -> None:
    plant_file(root, outside)
    manager = SandboxContentsManager(root_dir=str(root), allow_hidden=True)
    with pytest.raises(HTTPError, match=r"leads out by a symbolic link"):
        run(manager.get("x"))


def test_a_link_that_stays_inside_is_read_listed_and_removed(manager: Manager, root: Path) -> None:
    (root / "real").mkdir()
    (root / "real/file").write_text("content")
    (root / "link").symlink_to("real")
    (root / "x").symlink_to("real/file")
    assert run(manager.get("x"))["content"] == "content"
    assert run(manager.get("link/file"))["content"] == "content"
    assert [model["name"] for model in run(manager.get("link"))["content"]] == ["file"]
    run(manager.delete("x"))
    run(manager.delete("link"))
    assert state_of(root) == {".ipynb_checkpoints": "", "real": "", "real/file": "content"}


def test_what_was_planted_is_listed_renamed_and_deleted_as_a_link(
    manager: Manager, root: Path, outside: Path
) -> None:
    plant_file(root, outside)
    plant_folder(root, outside)
    (root / "nowhere").symlink_to("nothing")
    names = {model["name"] for model in run(manager.get(""))["content"]}
    assert names == {"x", "x.ipynb", "d", "mine", "nowhere"}
    run(manager.rename("x", "y"))
    for name in ("y", "x.ipynb", "d", "nowhere"):
        run(manager.delete(name))
    assert state_of(root).keys() == {"mine", ".ipynb_checkpoints"}
    assert state_of(outside) == {"file": KEPT}


def test_a_new_notebook_gets_a_name_that_no_link_has(
    manager: Manager, root: Path, outside: Path
) -> None:
    (root / "Untitled.ipynb").symlink_to("../outside/file")
    assert run(manager.new_untitled("", ext=".ipynb"))["name"] == "Untitled1.ipynb"


# -- what is no file


def test_a_fifo_is_not_waited_for(manager: Manager, root: Path) -> None:
    os.mkfifo(root / "x")
    os.mkfifo(root / "x.ipynb")
    attempts = (
        manager.get("x"), manager.save(text("new"), "x"), manager.save(notebook(), "x.ipynb"),
        manager.save(text("new", chunk=2), "x"), manager.create_checkpoint("x"), manager.copy("x"),
    )  # fmt: skip
    for attempt in attempts:
        with pytest.raises(HTTPError, match=r"not a regular file|non-file") as refused:
            run(attempt)
        assert refused.value.status_code in {400, 403}


def test_a_file_with_a_lease_is_refused_at_once(
    manager: Manager, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write_text(KEPT)
    ignored = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(root / "x", os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        for attempt in (manager.get("x"), manager.save(text("new"), "x")):
            with pytest.raises(HTTPError, match="held by a lease") as refused:
                run(attempt)
            assert refused.value.status_code == 403
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, ignored)


# -- races


@contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """A thread that exchanges two names, as fast as it can (renameat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (-100, os.fsencode(one), -100, os.fsencode(other), _RENAME_EXCHANGE)
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            libc.renameat2(*names)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


RACES: dict[str, Act] = {
    "save": lambda m: m.save(text("new"), "d/x"),
    "append": lambda m: m.save(text("new", chunk=2), "d/x"),
    "new": lambda m: m.save(text("new"), "d/new"),
    "make a directory": lambda m: m.save({"type": "directory"}, "d/folder"),
    "delete": lambda m: m.delete("d/victim"),
    "rename": lambda m: m.rename("d/victim", "d/renamed"),
    "checkpoint": lambda m: m.create_checkpoint("d/x"),
    "restore": lambda m: m.restore_checkpoint("checkpoint", "d/x"),
    "move in": lambda m: m.rename("mine", "d/mine"),
}


def prepare_race(root: Path, outside: Path) -> None:
    for folder in (root / "d", outside):
        folder.mkdir(exist_ok=True)
        for name in ("x", "victim"):
            (folder / name).write_text(KEPT)
    (root / "link").symlink_to(outside)
    (root / "mine").write_text("mine")


def attempt_often(manager: Manager, attempt: Act, again: Callable[[], None]) -> tuple[int, int]:
    """How often it succeeded, and how often it was refused: until it was both."""

    async def all_rounds() -> tuple[int, int]:
        done = refused = 0
        for round_ in range(_MOST_ROUNDS):
            if round_ >= _ROUNDS and done and refused:
                break
            again()
            try:
                await attempt(manager)
                done += 1
            except HTTPError as error:
                assert error.status_code < 500 or "No such file" in str(error)
                refused += 1
            except OSError:
                refused += 1
        return done, refused

    return asyncio.run(all_rounds())


@pytest.mark.parametrize("act", RACES)
def test_no_exchange_of_a_directory_and_a_link_leads_out(
    act: str, manager: Manager, root: Path, outside: Path
) -> None:
    prepare_race(root, outside)
    run(manager.create_checkpoint("d/x"))
    before = state_of(outside)
    # Made anew by descriptor, so that this test itself does not change what is outside.
    folder = os.open(root / "d", os.O_RDONLY)

    def make_anew() -> None:
        for name in ("new", "folder", "renamed", "mine"):
            with suppress(OSError):
                (os.rmdir if name == "folder" else os.unlink)(name, dir_fd=folder)
        fd = os.open("victim", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
        os.close(fd)
        (root / "mine").write_text("mine")

    try:
        with exchanging(root / "d", root / "link"):
            done, refused = attempt_often(manager, RACES[act], make_anew)
    finally:
        os.close(folder)
    assert state_of(outside) == before
    assert done
    assert refused


@pytest.mark.parametrize("act", ["save", "append", "restore"])
def test_no_exchange_of_a_file_and_a_link_leads_out(
    act: str, manager: Manager, root: Path, outside: Path
) -> None:
    prepare_race(root, outside)
    run(manager.create_checkpoint("d/x"))
    (root / "d/link").symlink_to(outside / "x")
    before = state_of(outside)
    with exchanging(root / "d/x", root / "d/link"):
        done, refused = attempt_often(manager, RACES[act], lambda: None)
    assert state_of(outside) == before
    assert done
    assert refused


def test_no_exchange_of_a_file_and_a_link_lets_its_content_be_read(
    manager: Manager, root: Path, outside: Path
) -> None:
    (root / "x").write_text("mine")
    (root / "link").symlink_to(outside / "file")
    found = set()

    async def read(manager: Manager) -> None:
        found.add((await manager.get("x", type="file"))["content"])

    with exchanging(root / "x", root / "link"):
        done, refused = attempt_often(manager, read, lambda: None)
    assert found == {"mine"}
    assert done
    assert refused


# -- what stays as it was


def test_a_saved_file_keeps_its_inode_and_mode(manager: Manager, root: Path) -> None:
    path = root / "x"
    path.write_text("long before")
    path.chmod(0o640)
    before = path.stat()
    run(manager.save(text("new"), "x"))
    after = path.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert state_of(root) == {"x": "new"}


def test_what_was_there_comes_back_if_saving_fails(manager: Manager, root: Path) -> None:
    (root / "x").write_text(KEPT)
    for name in ("x", "new"):
        with pytest.raises(ZeroDivisionError), manager.atomic_writing(str(root / name)) as file:
            file.write("half")
            file.flush()
            raise ZeroDivisionError
    assert state_of(root) == {"x": KEPT}


def test_an_upload_in_pieces_is_whole(manager: Manager, root: Path) -> None:
    for chunk, piece in ((1, "one "), (2, "two "), (-1, "three")):
        run(manager.save(text(piece, chunk=chunk), "x"))
    assert (root / "x").read_text() == "one two three"


def test_a_file_moves_to_another_file_system(root: Path, watch: Any) -> None:
    other = Path("/dev/shm", f"sbx-{os.getpid()}")
    other.mkdir()
    watch.temporary.append(other)
    if other.stat().st_dev == root.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    (root / "x").write_text("content")
    with (
        Beneath(str(root)).entry(str(root / "x")) as old,
        Beneath(str(other)).entry(str(other / "y")) as new,
    ):
        move(old, new)
    assert (state_of(root), state_of(other)) == ({}, {"y": "content"})


def test_checkpoints_of_a_directory_that_cannot_be_written_to_are_not_in_tmp(
    manager: Manager, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (root / "d").mkdir()
    (root / "d/x").write_text(KEPT)
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, m: str(p) != str(root / "d") and real(p, m))
    run(manager.create_checkpoint("d/x"))
    assert state_of(root) == {"d": "", "d/x": KEPT}
    (root / "d/x").write_text("changed")
    run(manager.restore_checkpoint("checkpoint", "d/x"))
    assert (root / "d/x").read_text() == KEPT


# -- the trash


@pytest.fixture
def home(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root directory is the home, as on a hub."""
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return root


def test_what_is_deleted_goes_to_the_trash_with_a_note(home: Path) -> None:
    manager = SandboxContentsManager(root_dir=str(home))
    for content in ("one", "two"):
        (home / "x.txt").write_text(content)
        run(manager.delete("x.txt"))
    (home / "folder").mkdir()
    run(manager.delete("folder"))
    trash = home / ".local/share/Trash"
    assert (trash / "files/x.txt").read_text() == "one"
    assert (trash / "files/x 1.txt").read_text() == "two"
    assert (trash / "files/folder").is_dir()
    assert f"Path={home}/x.txt\n" in (trash / "info/x 1.txt.trashinfo").read_text()


def test_no_link_in_the_trash_is_followed(home: Path, outside: Path) -> None:
    manager = SandboxContentsManager(root_dir=str(home))
    (home / ".local/share/Trash").mkdir(parents=True)
    (home / ".local/share/Trash/files").symlink_to(outside)
    (home / "evil.desktop").write_text("Exec=…")
    with pytest.raises(HTTPError, match=r"symbolic link.*not followed"):
        run(manager.delete("evil.desktop"))
    assert state_of(outside) == {"file": KEPT}
    assert (home / "evil.desktop").exists()


def test_templates_of_the_current_directory_are_off_before_there_is_a_kernel(
    tmp_path: Path,
) -> None:
    server = Configurable(config=Config())
    SandboxContentsManager(root_dir=str(tmp_path), parent=server)
    assert server.config.TemplateExporter.extra_template_basedirs == []
