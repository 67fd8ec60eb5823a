"""left_behind.py - on the host, between starts: links, programs and folders that a kernel left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from frame import Kind, between
from tools import SECRET, answer_of, read

SWAPPED = "a directory that was moved away, and a link in its place"
MAGIC = "/proc/self/root"
READ = "print(open('secret').read())"


def read_plainly(stage, target=""):
    """What an open by name gives where that link lies."""
    put_link(stage, target)
    return read(stage.workdir / "sub/secret")


def put_link(stage, target):
    """A link in the work directory, for which "{other}" is another person's directory."""
    link = stage.workdir / "sub"
    link.symlink_to(target.format(other=stage.place / "other", place=stage.place))


def list_plainly(stage, target):
    put_link(stage, target)
    os.listdir(stage.workdir / "sub")
    return "listed"


# -- where a kernel starts

for number, title, target in (
    (300, "start in a link to another person's directory", "{other}"),
    (301, "start in a relative link to it", "../other"),
    (302, "start in a link that goes through /proc", MAGIC + "{other}"),
    (303, "start in a link by way of the directory that a server is in", "/proc/self/cwd/../other"),
):

    @between(
        number, title, Kind.PATHS, SWAPPED, target,
        expect="refused", without=read_plainly, control=SECRET,
    )  # fmt: skip
    def start_in_link(stage, target):
        put_link(stage, target)
        return stage.tries(stage.workdir / "sub", READ)


for number, title, target in (
    (304, "start in a link to /etc", "/etc"),
    (305, "start in a link to the root directory", "/"),
    (306, "start in a link to the records of all kernels", "{place}/run"),
):

    @between(
        number, title, Kind.PATHS, SWAPPED, target,
        expect="refused", without=list_plainly, control="listed",
    )  # fmt: skip
    def start_in_link_to_system(stage, target):
        put_link(stage, target)
        return stage.tries(stage.workdir / "sub", "print('it started')")


def make_deep(stage):
    (stage.place / "other/b/c").mkdir(parents=True)
    shutil.copy(stage.place / "other/secret", stage.place / "other/b/c")
    (stage.workdir / "a").symlink_to(stage.place / "other")
    return stage.workdir / "a/b/c"


@between(
    307, "start below a link, some directories up", Kind.PATHS, SWAPPED, expect="refused",
    without=lambda stage: read(make_deep(stage) / "secret"), control=SECRET,
)  # fmt: skip
def start_below_link(stage):
    return stage.tries(make_deep(stage), READ)


@between(
    308, "start where the option workdir names a link", Kind.PATHS, SWAPPED, "{other}",
    expect="refused", without=read_plainly, control=SECRET,
)  # fmt: skip
def start_in_named_link(stage, target):
    put_link(stage, target)
    return stage.tries(stage.workdir, READ, workdir=f"{stage.workdir}/sub")


@between(
    309, "have a volume that is a link", Kind.PATHS, SWAPPED, "{other}",
    expect="refused", landlock=None, without=read_plainly, control=SECRET,
)  # fmt: skip
def start_with_linked_volume(stage, target):
    put_link(stage, target)
    volume = f"{stage.workdir}/sub:/given"
    return stage.tries(stage.workdir, "print(open('/given/secret').read())", volumes=[volume])


@between(
    310, "be restarted where a link was put meanwhile", Kind.PATHS, SWAPPED,
    expect="refused", without=lambda stage: read_plainly(stage, "{other}"), control=SECRET,
)  # fmt: skip
def restart_in_link(stage):
    (stage.workdir / "sub").mkdir()
    with stage.kernel(stage.workdir / "sub") as kernel:
        (stage.workdir / "sub").rename(stage.workdir / "away")
        put_link(stage, "{other}")
        return stage.outcome(lambda: kernel.restart() or kernel.run(READ))


SWAP = """
import ctypes, os, sys
one, other = map(os.fsencode, sys.argv[1:])
libc = ctypes.CDLL(None)
print(libc.renameat2(-100, one, -100, other, 2), flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)
"""


@contextlib.contextmanager
def swapping(one: Path, other: Path):
    """Both change places, as fast as can be: in another process, since a thread would hold ours."""
    words = [sys.executable, "-c", SWAP, one, other]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as swapper:
        try:
            assert swapper.stdout.readline() == b"0\n"
            yield
        finally:
            swapper.kill()


def make_both(stage):
    (stage.workdir / "sub").mkdir()
    (stage.workdir / "sub/secret").write_text("its own")
    (stage.workdir / "link").symlink_to(stage.place / "other")
    return stage.workdir / "sub", stage.workdir / "link"


def read_while_swapped(stage, *_):
    one, link = make_both(stage)
    with swapping(one, link):
        return (
            SECRET
            if SECRET in {answer_of(read, one / "secret") for _ in range(20_000)}
            else "never"
        )


for number, title, options in (
    (311, "swap a directory and a link during starts in it", {}),
    (312, "swap the source of a volume and a link during starts", {"volumes": ["{sub}:/given"]}),
):

    @between(
        number, title, Kind.PATHS, "renameat2(RENAME_EXCHANGE) in a loop", options,
        expect="its own or refused", without=read_while_swapped, control=SECRET,
        landlock=None if options else "its own or refused",
    )  # fmt: skip
    def start_while_swapped(stage, options):
        one, link = make_both(stage)
        code = READ if not options else "print(open('/given/secret').read())"
        options = {n: [w.format(sub=one) for w in words] for n, words in options.items()}
        where = stage.workdir if options else one
        with swapping(one, link):
            found = {stage.tries(where, code, **options) for _ in range(4)}
        return "its own or refused" if found <= {"its own", "refused"} else f"{found}"


def make_link(stage):
    link = stage.workdir / "link"
    link.symlink_to(stage.place / "other/secret")
    return link


@between(
    313, "be told of the host by resolve_path", Kind.PATHS, "a link in the work directory",
    expect="None", without=lambda stage: read(make_link(stage)), control=SECRET,
)  # fmt: skip
def resolve_link(stage):
    make_link(stage)
    with stage.kernel() as kernel:
        return str(kernel.manager.provisioner.resolve_path("link"))


@between(
    314, "have the clean-up remove files elsewhere", Kind.CLEANING, SWAPPED,
    expect="still there", landlock=None,
    no_control="nobody but our own clean-up would remove them",
)  # fmt: skip
def clean_elsewhere(stage):
    theirs = stage.place / "other/jupyter_config.json"
    theirs.touch()
    with stage.kernel(stage.place / "server"):
        (stage.place / "server").rename(stage.place / "away")
        (stage.place / "server").symlink_to(stage.place / "other")
    return "still there" if theirs.exists() else "removed"


# -- what has to be cleaned up

DEEP = """
import os
for _ in range(1500):
    os.mkdir("d"); os.chdir("d")
"""
# Since Python 3.13 shutil.rmtree calls itself no more.
TOO_DEEP = "RecursionError|done"
CLOSED = "import os; os.mkdir('closed'); open('closed/file', 'w'); os.chmod('closed', 0)"
MANY = "for n in range(5000): open(f'file-{n}', 'w').close()"


def remove_plainly(stage, code):
    folder = stage.place / "plain/deep"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=folder)
    return answer_of(shutil.rmtree, folder).partition(":")[0]


for number, title, code, control in (
    (340, "leave directories in directories beside the sockets, 1500 deep", DEEP, TOO_DEEP),
    (341, "leave a directory that cannot be entered", CLOSED, "done"),
    (342, "leave 5000 files", MANY, "done"),
):

    @between(
        number, title, Kind.CLEANING, "a removal that trusts what it removes", code,
        expect="it started", without=remove_plainly, control=control,
    )  # fmt: skip
    def leave_strange_things(stage, code):
        place = "/run/kernel" if stage.variant.group != "landlock" else "."
        text = f"import os; os.chdir({place!r})\n{code}"
        argv = [sys.executable, "-c", text, "{connection_file}"]
        stage.tries(stage.workdir, "1", argv=argv, start_timeout=5)
        return stage.tries(stage.workdir, "print('it started')")
