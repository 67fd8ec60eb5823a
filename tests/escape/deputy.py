"""deputy.py - on the host: the server's contents manager acts where a kernel has put a link.

The front end asks for what it asks for all day; what it asks of is ours (`install --server`), or,
as the control, jupyter_server's own.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from frame import Kind, between
from stage import PATIENCE
from tools import SECRET, read

DEPUTY = "the confused deputy: a save, copy or delete with the server's rights"
NOTEBOOK = {
    "type": "notebook",
    "content": {"cells": [], "metadata": {"$(id)": 1}, "nbformat": 4, "nbformat_minor": 5},
}
TEXT = {"type": "file", "format": "text", "content": "$(id)"}
LINKED_FILE = "os.symlink('../other/secret', 'x'); os.symlink('../other/secret', 'x.ipynb')"
LINKED_FOLDER = "open('mine', 'w').close(); os.symlink('../other', 'd')"
CHECKPOINT = (
    "open('x', 'w').close(); os.mkdir('.ipynb_checkpoints'); "
    "os.symlink('../../other/secret', '.ipynb_checkpoints/x-checkpoint')"
)
INSIDE = "open('.bashrc', 'w').close(); os.symlink('.bashrc', 'x')"

# What the kernel does in the work directory, and what a front end asks for then.
WAYS = (
    (470, "put a link to somebody's file in a notebook's place, which is saved", LINKED_FILE,
        lambda m: m.save(NOTEBOOK, "x.ipynb")),
    (471, "put one in a text file's place, which is saved", LINKED_FILE,
        lambda m: m.save(TEXT, "x")),
    (472, "put one where an upload goes on", LINKED_FILE,
        lambda m: m.save({**TEXT, "chunk": 2}, "x")),
    (473, "put one in a file's place, which is downloaded", LINKED_FILE,
        lambda m: m.get("x", type="file")),
    (474, "put one in a file's place, which is copied", LINKED_FILE, lambda m: m.copy("x")),
    (475, "put one where the copy before a save goes", "open('x', 'w').write('$(id)'); "
        "os.symlink('../other/secret', '.~x')", lambda m: m.save(TEXT, "x")),
    (476, "put one in a checkpoint's place, which is made", CHECKPOINT,
        lambda m: m.create_checkpoint("x")),
    (477, "put one in a checkpoint's place, which is restored", CHECKPOINT,
        lambda m: m.restore_checkpoint("checkpoint", "x")),
    (478, "put a link in place of all checkpoints", "open('x', 'w').close(); "
        "os.symlink('../other', '.ipynb_checkpoints')", lambda m: m.create_checkpoint("x")),
    (479, "put a link in a directory's place, and have a file in it saved", LINKED_FOLDER,
        lambda m: m.save(TEXT, "d/secret")),
    (480, "have a new notebook made in it", LINKED_FOLDER,
        lambda m: m.new_untitled("d", ext=".ipynb")),
    (481, "have a file in it deleted", LINKED_FOLDER, lambda m: m.delete("d/secret")),
    (482, "have a file in it renamed", LINKED_FOLDER, lambda m: m.rename("d/secret", "d/other")),
    (483, "have a file moved out of it", LINKED_FOLDER, lambda m: m.rename("d/secret", "mine2")),
    (484, "have a file moved into it", LINKED_FOLDER, lambda m: m.rename("mine", "d/mine")),
    (485, "have it copied", LINKED_FOLDER, lambda m: m.copy("d", "copied")),
)  # fmt: skip


def plant_inside(stage, code):
    with stage.kernel() as kernel:
        assert kernel.run(f"import os; {code}") == ""


def plant_plainly(stage, code):
    words = [sys.executable, "-c", f"import os; {code}"]
    subprocess.run(words, cwd=stage.workdir, check=True)


def managers():
    """Ours, and the one that it is made of."""
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

    from sandbox_provisioner.contents import SandboxContentsManager

    return SandboxContentsManager, AsyncLargeFileManager


def asked(stage, kind, acts):
    """What came of *acts*, coroutines of a manager of that *kind*: the last status that was an
    error, or "done"."""
    from nbformat.sign import MemorySignatureStore, NotebookNotary
    from tornado.web import HTTPError

    manager = kind(root_dir=str(stage.workdir), delete_to_trash=False)
    manager.notary = NotebookNotary(
        parent=manager, store_factory=MemorySignatureStore, secret=b"secret"
    )

    async def ask():
        said = "done"
        for act in acts:
            try:
                answer = await act(manager)
                said = SECRET if SECRET in str(answer) else said
            except HTTPError as error:
                said = f"{error.status_code}"
            except OSError as error:  # jupyter_server's own looks once more at what is gone by then
                said = type(error).__name__
        return said

    return asyncio.run(ask())


def is_changed(other):
    return os.listdir(other) != ["secret"] or read(other / "secret") != SECRET


def outcome(stage, said):
    """ "changed" or "read" if the deputy was led astray, "refused" if it said so."""
    if is_changed(stage.place / "other"):
        return "changed"
    ours = (path for path in stage.workdir.rglob("*") if path.is_file() and not path.is_symlink())
    if said == SECRET or any(SECRET in path.read_text() for path in ours):
        return "read"
    return "refused" if said == "403" else said


def ask_plainly(stage, code, act):
    plant_plainly(stage, code)
    return outcome(stage, asked(stage, managers()[1], [act]))


for number, title, code, act in WAYS:

    @between(
        number, title, Kind.CONTENTS, DEPUTY, code, act, variants=("root",),
        needs=("jupyter_server",), expect="refused|done" if number == 475 else "refused",
        without=ask_plainly, control="changed|read",
    )  # fmt: skip
    def lead_astray(stage, code, act):
        plant_inside(stage, code)
        return outcome(stage, asked(stage, managers()[0], [act]))


def at_home(stage, said):
    return "changed" if (stage.workdir / ".bashrc").read_text() else outcome(stage, said)


def save_at_home_plainly(stage):
    plant_plainly(stage, INSIDE)
    said = asked(stage, managers()[1], [lambda m: m.save(TEXT, "x")])
    return at_home(stage, said)


@between(
    486, "put a link to a start-up file beside it in a file's place", Kind.CONTENTS, DEPUTY,
    variants=("root",), needs=("jupyter_server",),
    expect="refused", without=save_at_home_plainly, control="changed",
)  # fmt: skip
def save_at_home(stage):
    """The link does not lead out of the server's root directory, which is a home."""
    plant_inside(stage, INSIDE)
    return at_home(stage, asked(stage, managers()[0], [lambda m: m.save(TEXT, "x")]))


SWAP = """
import ctypes, os, threading
os.path.isdir("d") or os.mkdir("d")
os.path.islink("link") or os.symlink("../other", "link")
libc = ctypes.CDLL(None)
def swap():
    while not os.path.exists("over"):
        libc.renameat2(-100, b"d", -100, b"link", 2)
thread = threading.Thread(target=swap)
thread.start()
"""


def save_while_swapped(stage, kind, most):
    """Saves until one went where the link leads, *most* at the most."""
    acts = [lambda m: m.save(TEXT, "d/secret")] * 50
    for _ in range(most // len(acts)):
        asked(stage, kind, acts)
        if is_changed(stage.place / "other"):
            break
    (stage.workdir / "over").touch()


def swap_plainly(stage):
    words = [sys.executable, "-c", f"{SWAP}\nprint(flush=True)"]
    with subprocess.Popen(words, cwd=stage.workdir, stdout=subprocess.PIPE) as swapper:
        try:
            assert swapper.stdout.readline() == b"\n"
            save_while_swapped(stage, managers()[1], 20_000)
            assert swapper.wait(PATIENCE) == 0
        finally:
            swapper.kill()
    return outcome(stage, "never")


@between(
    487, "swap a directory and a link while files in it are saved", Kind.CONTENTS,
    "renameat2(RENAME_EXCHANGE) in a loop", needs=("jupyter_server",),
    expect="never", without=swap_plainly, control="changed",
)  # fmt: skip
def swap_while_saved(stage):
    """What came of it is looked at when nothing is swapped any more: who looks follows links too,
    where they take a directory's place between two looks."""
    with stage.kernel() as kernel:
        assert kernel.run(SWAP) == ""
        save_while_swapped(stage, managers()[0], 400)
        assert kernel.run("thread.join()") == ""
    return outcome(stage, "never")
