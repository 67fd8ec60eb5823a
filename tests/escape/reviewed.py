"""reviewed.py - on the host: what a kernel lays aside for whoever looks at it, and keeps it.

A control is who copies the upper directory over the work directory, as one would by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from frame import Kind, between
from repositories import BELOW, KERNEL, repository, use
from tools import SECRET

from sandbox_provisioner.app.review import as_text, keep
from sandbox_provisioner.layers import keep as keeping
from sandbox_provisioner.layers.folders import folders_of
from sandbox_provisioner.layers.review import reviewed

LAID = "what a kernel laid aside"
MARK = "a person's own"


def laid_aside(stage, code, cwd=""):
    """What a kernel leaves that ran *code*."""
    layers = stage.place / "layers"
    with stage.kernel(cwd, workdir_mode="review", layer_dir=str(layers)) as kernel:
        kernel.run(code)
    [found] = folders_of(layers)
    return found


def kept(found):
    folder, about = found
    assert folder.take()
    try:
        return keep(folder, about, (), overwrite=True)
    finally:
        folder.forget()


def copied(stage, found):
    """By hand, as root or as the user."""
    upper = found[0].upper
    for path in sorted(upper.rglob("*")):
        target = stage.workdir / path.relative_to(upper)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.is_symlink() or path.is_file():
            shutil.copy2(path, target)


def planted(stage, path, text):
    """What a kernel has laid aside that got out of its box: it writes where an overlay keeps it."""
    program = repository(stage)
    found = laid_aside(stage, "open('.git/description', 'w').write('mine')")
    target = found[0].upper / ".git" / path
    target.parent.mkdir(exist_ok=True)
    target.parent.chmod(0o755)
    target.unlink(missing_ok=True)
    target.write_text(text.format(program=program))
    target.chmod(0o755)
    return found


def plant_and_copy(stage, path, text):
    copied(stage, planted(stage, path, text))
    return use(stage)


HOOK = "#!/bin/sh\nexec {program}\n"
OWN = "[core]\n\tfsmonitor = {program}\n"
for number, title, path, text in (
    (820, "plant a hook where it is laid aside, and have it kept", "hooks/pre-commit", HOOK),
    (821, "plant a configuration there, and have it kept", "config.worktree", OWN),
):

    @between(
        number, title, Kind.REVIEWED, LAID, path, text,
        needs=("git",), expect="not run", landlock=None, without=plant_and_copy, control="run",
    )  # fmt: skip
    def have_kept_in_repository(stage, path, text):
        kept(planted(stage, path, text))
        return use(stage)


def use_below_by_hand(stage, way):
    program = repository(stage)
    found = laid_aside(stage, KERNEL.format(program=program, way=way))
    copied(stage, found)
    stage.workdir = stage.workdir / "below"
    return use(stage)


@between(
    822, "make a repository in a directory below, and have it kept", Kind.REVIEWED, LAID, BELOW,
    needs=("git",), expect="not run", landlock=None, without=use_below_by_hand, control="run",
)  # fmt: skip
def have_repository_kept(stage, way):
    program = repository(stage)
    found = laid_aside(stage, KERNEL.format(program=program, way=way))
    kept(found)
    stage.workdir = stage.workdir / "below"
    return use(stage)


# -- links, and what stands where they lead


def beside(stage):
    """A directory of a person's, beside the work directory."""
    (stage.place / "other/sub").mkdir()
    (stage.place / "other/sub/file").write_text(MARK)
    (stage.workdir / "sub").mkdir()
    (stage.workdir / "sub/file").write_text("mine")
    return stage.place / "other/sub/file"


WRITE = "open('sub/file', 'w').write('evil')"


def swap(stage):
    """As another kernel, with a work directory of this one's, could do it."""
    os.rename(stage.workdir / "sub", stage.workdir / "was")
    (stage.workdir / "sub").symlink_to(stage.place / "other/sub")


def swap_and_copy(stage):
    target = beside(stage)
    found = laid_aside(stage, WRITE)
    swap(stage)
    copied(stage, found)
    return target.read_text()


@between(
    823, "let a link take the place of a directory before a change in it is kept", Kind.REVIEWED,
    LAID, expect=MARK, landlock=None, without=swap_and_copy, control="evil",
)  # fmt: skip
def swap_before(stage):
    target = beside(stage)
    found = laid_aside(stage, WRITE)
    swap(stage)
    kept(found)
    return target.read_text()


def open_by_name(directory, path, flags):
    """As a program would that trusts in paths."""
    return os.open(f"/proc/self/fd/{directory}/{path or '.'}", flags)


def swap_when_opened(stage, real):
    def opened(directory, path, flags):
        if path == "sub" and not (stage.workdir / "sub").is_symlink():
            swap(stage)
        return real(directory, path, flags)

    target = beside(stage)
    found = laid_aside(stage, WRITE)
    stage.patch.setattr(keeping, "open_below", opened)
    kept(found)
    return target.read_text()


def trust_in_paths(stage):
    """The same, where what is compared is what the link leads to."""
    stage.patch.setattr(keeping, "_is_still", lambda *_: True)
    return swap_when_opened(stage, open_by_name)


@between(
    824, "let a link take its place while the change is kept", Kind.REVIEWED, LAID,
    expect=MARK, landlock=None, without=trust_in_paths, control="evil",
)  # fmt: skip
def swap_meanwhile(stage):
    return swap_when_opened(stage, keeping.open_below)


def read_copied(stage):
    beside(stage)
    found = laid_aside(stage, f"import os; os.symlink({str(stage.place / 'other/secret')!r}, 'x')")
    upper = found[0].upper
    shutil.copy(upper / "x", stage.workdir / "x")
    return (stage.workdir / "x").read_text()


@between(
    825, "have the file copied that a link leads to", Kind.REVIEWED, LAID,
    expect="a link", landlock=None, without=read_copied, control=SECRET,
)  # fmt: skip
def have_link_kept(stage):
    beside(stage)
    found = laid_aside(stage, f"import os; os.symlink({str(stage.place / 'other/secret')!r}, 'x')")
    kept(found)
    return "a link" if (stage.workdir / "x").is_symlink() else (stage.workdir / "x").read_text()


# -- who looks


def told(stage, found):
    with reviewed(*found) as review:
        return as_text(*found, list(review.walk.changes()))


TITLE = "\x1b]0;owned\x07"


def list_plainly(stage):
    found = laid_aside(stage, f"open({TITLE!r}, 'w').close()")
    listed = subprocess.run(["find", str(found[0].upper)], capture_output=True, check=True).stdout
    return "spoken to" if TITLE.encode() in listed else "not spoken to"


@between(
    826, "speak to the terminal of whoever looks, by the name of a file", Kind.REVIEWED, LAID,
    expect="not spoken to", landlock=None, without=list_plainly, control="spoken to",
)  # fmt: skip
def speak_by_name(stage):
    found = laid_aside(stage, f"open({TITLE!r}, 'w').close()")
    return "spoken to" if TITLE in told(stage, found) else "not spoken to"


def size_of(path: Path) -> int:
    return path.lstat().st_blocks * 512


SPARSE = "open('big', 'wb').truncate(1 << 40)"


def read_it_all(stage):
    """Whoever reads it: how much of a second that takes says nothing, how much there is does."""
    found = laid_aside(stage, SPARSE)
    return "endless" if (found[0].upper / "big").stat().st_size > 1 << 36 else "short"


@between(
    827, "have a file of a tebibyte of nothing read", Kind.REVIEWED, LAID,
    expect="short", landlock=None, without=read_it_all, control="endless",
)  # fmt: skip
def keep_nothing(stage):
    found = laid_aside(stage, SPARSE)
    told(stage, found)
    kept(found)
    return "short" if size_of(stage.workdir / "big") < 1 << 20 else "endless"


# -- the folder of another kernel


@between(
    828, "find what another kernel has laid aside", Kind.REVIEWED, LAID,
    expect="nothing", landlock=None, without=lambda stage: find_laid(stage, boxed=False),
    control="there",
)  # fmt: skip
def find_others(stage):
    return find_laid(stage, boxed=True)


def find_laid(stage, *, boxed):
    found = laid_aside(stage, "open('new', 'w').close()")
    path = str(found[0].upper)
    code = f"import os; print('there' if os.path.exists({path!r}) else 'nothing')"
    if not boxed:
        return "there" if os.path.exists(path) else "nothing"
    layers = str(stage.place / "layers")
    return stage.tries(stage.workdir, code, workdir_mode="review", layer_dir=layers)
