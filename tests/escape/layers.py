"""layers.py - on the host: what a kernel leaves where what it installs is kept.

A control is who takes the folder of a layer for a folder as any other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import site
import sys
from pathlib import Path

import roots
from frame import Kind, between
from layered import opened, own
from tools import SECRET, read

from sandbox_provisioner.app.layer import as_text
from sandbox_provisioner.layers.kept import layers_of, told_of

KEPT = "what a kernel installed"


def layer_of(stage, code, **options):
    """The folder of the layer that a kernel leaves which ran *code*."""
    layers = stage.place / "layers"
    stage.tries(stage.workdir, code, layer="user", layer_dir=str(layers), **options)
    [(folder, holder)] = layers_of(layers, os.geteuid())
    return folder, holder


def next_one(stage, code, **options):
    """What the next kernel says with the same layer."""
    layers = str(stage.place / "layers")
    return stage.tries(stage.workdir, code, layer="user", layer_dir=layers, **options)


LINK = (
    "import os; os.makedirs('/home/jovyan/.local/x'); os.symlink({!r}, '/home/jovyan/.local/x/y')"
)
READ = """
try:
    print(open('/home/jovyan/.local/x/y').read())
except OSError as error:
    print(type(error).__name__)
"""


def follow_by_hand(stage):
    folder, _ = layer_of(stage, LINK.format(str(stage.place / "other/secret")))
    with opened(folder) as box:
        return read(box / "base/x/y")


@between(
    850, "leave a link to another person's file for the next kernel", Kind.LAYERS, KEPT,
    expect="FileNotFoundError", landlock=None, without=follow_by_hand, control=SECRET,
)  # fmt: skip
def link_for_the_next(stage):
    layer_of(stage, LINK.format(str(stage.place / "other/secret")))
    return next_one(stage, READ)


def count_by_hand(stage):
    folder, _ = layer_of(stage, LINK.format(str(stage.place / "other")))
    with opened(folder) as box:
        found = [f for _, _, files in os.walk(box, followlinks=True) for f in files]
    return "counted" if "secret" in found else "left alone"


@between(
    851, "have another person's files looked at with what was installed", Kind.LAYERS, KEPT,
    expect="left alone", landlock=None, without=count_by_hand, control="counted",
)  # fmt: skip
def have_counted(stage):
    (stage.place / "other/many").mkdir()
    for number in range(500):
        (stage.place / f"other/many/{number}").touch()
    folder, _ = layer_of(stage, LINK.format(str(stage.place / "other")))
    return "counted" if folder.size()[1] > 500 else "left alone"


START = """
import os, site
path = site.getusersitepackages()
os.makedirs(path, exist_ok=True)
mark = {!r}
for name in ('usercustomize.py', 'sitecustomize.py'):
    open(path + '/' + name, 'w').write(f"open({{mark!r}}, 'w').close()")
open(path + '/a.pth', 'w').write(f"import os; open({{mark!r}}, 'w').close()")
"""


def started(stage):
    """What the host does with a layer: it lists it, and starts the next kernel with it."""
    mark = stage.place / "open/marker"
    folder, holder = layer_of(stage, START.format(str(mark)))
    as_text([told_of(folder, holder)])
    next_one(stage, "1")
    return "run" if mark.exists() else "not run"


def start_by_hand(stage):
    mark = stage.place / "open/marker"
    folder, _ = layer_of(stage, START.format(str(mark)))
    before = sys.path[:]
    with opened(folder) as box:
        for path in (box / "base").rglob("a.pth"):
            site.addsitedir(str(path.parent))
    sys.path[:] = before
    return "run" if mark.exists() else "not run"


@between(
    852, "install what every Python runs when it starts", Kind.LAYERS, KEPT,
    expect="not run", landlock=None, without=start_by_hand, control="run",
)  # fmt: skip
def install_a_start(stage):
    return started(stage)


@between(
    853, "find the folder of what is kept", Kind.LAYERS, KEPT, expect="nothing", landlock=None,
    without=lambda stage: "there" if layer_of(stage, "1")[0].path.exists() else "nothing",
    control="there",
)  # fmt: skip
def find_folder(stage):
    folder, _ = layer_of(stage, "1")
    code = f"import os; print('there' if os.path.exists({str(folder.path)!r}) else 'nothing')"
    return next_one(stage, code)


# -- over another root: whoever got out of the box writes where the overlay keeps it


@contextlib.contextmanager
def planted(stage):
    """In the place of /etc, a link to another person's directory."""
    stage.facts["root"] = str(roots.directory())
    options = {"rootfs": stage.facts["root"], "argv": ROOT_KERNEL}
    folder, _ = layer_of(stage, "1", **options)
    with opened(folder) as box:
        etc = box / "upper/etc"
        shutil.rmtree(etc)
        etc.symlink_to(stage.place / "other")
        own(etc, 0)
        yield etc, options


ROOT_KERNEL = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def made_in(folder: Path):
    return "made" if (folder / "passwd").exists() else "nothing"


def make_by_hand(stage):
    with planted(stage) as (etc, _):
        (etc / "passwd").write_text("")
    return made_in(stage.place / "other")


@between(
    854, "lead the box's own files elsewhere, by a link in the place of /etc", Kind.LAYERS, KEPT,
    expect="nothing, and it started", variants=("root",), without=make_by_hand, control="made",
)  # fmt: skip
def lead_elsewhere(stage):
    with planted(stage) as (_, options):
        pass
    said = next_one(stage, "print(open('/etc/passwd').read())", **options)
    has = "it started" if "jovyan" in said else f"it said {said}"
    return f"{made_in(stage.place / 'other')}, and {has}"
