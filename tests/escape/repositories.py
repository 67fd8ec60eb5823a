"""repositories.py - on the host: what a kernel leaves in a repository, and git outside then runs.

Whoever comes after it does what people do: looks at the status, commits, switches branches.
"""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

from frame import Kind, between
from stage import PATIENCE

USED = """
git status; git diff; git log -1; git add -A; git commit -m work; git checkout -b other; git fetch
git submodule update --init; git stash; git gc --auto
"""
CONFIG = "[core]\\n\\tfsmonitor = {program}\\n\\tsshCommand = {program}\\n\\tpager = {program}\\n"
# What the kernel does in the work directory, which is the repository; "{program}" is its program.
WAYS = (
    (420, "change .git/config", f"write('.git/config', '{CONFIG}')"),
    (421, "plant a hook", "write('.git/hooks/pre-commit', script, 0o755); "
        "write('.git/hooks/post-checkout', script, 0o755)"),
    (422, "plant a hook by renaming the directory of hooks", "os.rename('.git/hooks', '.git/old'); "
        "write('.git/hooks/pre-commit', script, 0o755)"),
    (423, "name another common directory in .git/commondir",
        f"write('.git/commondir', '../evil'); write('evil/config', '{CONFIG}'); "
        "shutil.copytree('.git/objects', 'evil/objects'); "
        "shutil.copytree('.git/refs', 'evil/refs')"),
    (424, "move .git away, and make another one",
        f"shutil.copytree('.git', 'new'); os.rename('.git', 'old'); os.rename('new', '.git'); "
        f"write('.git/config', '{CONFIG}')"),
    (425, "move .git away, and put a file that names another one",
        f"shutil.copytree('.git', 'new'); os.rename('.git', 'old'); write('.git', 'gitdir: new'); "
        f"write('new/config', '{CONFIG}')"),
    (426, "plant a configuration of the work tree's own",
        f"write('.git/config.worktree', '{CONFIG}')"),
    (427, "plant a filter by attributes and configuration",
        "write('.git/info/attributes', '* filter=evil'); write('.gitattributes', '* filter=evil'); "
        "append('.git/config', "
        "'[filter \"evil\"]\\n\\tclean = {program}\\n\\tsmudge = {program}\\n')"),
    (428, "put a link in place of .git/config", "os.unlink('.git/config'); "
        f"write('evil', '{CONFIG}'); os.symlink('../evil', '.git/config')"),
    (429, "write by way of a lock, as git does", f"write('.git/config.lock', '{CONFIG}'); "
        "os.rename('.git/config.lock', '.git/config')"),
    (431, "put a link in place of .git", f"shutil.copytree('.git', 'new'); "
        f"write('new/config', '{CONFIG}'); os.rename('.git', 'old'); os.symlink('new', '.git')"),
    (432, "swap .git/config for another file", f"write('.git/mine', '{CONFIG}'); "
        "exchange('.git/mine', '.git/config')"),
    (433, "swap .git for another directory", f"shutil.copytree('.git', 'new'); "
        f"write('new/config', '{CONFIG}'); exchange('new', '.git')"),
    (434, "run git config inside", "os.system('git config core.fsmonitor {program}')"),
)  # fmt: skip

KERNEL = """
import ctypes, os, shutil
def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'w') as file:
        file.write(text.format(program={program!r}))
    os.chmod(path, mode)
def append(path, text):
    with open(path, 'a') as file:
        file.write(text.format(program={program!r}))
def exchange(one, other):
    if ctypes.CDLL(None, use_errno=True).renameat2(-100, one.encode(), -100, other.encode(), 2):
        raise OSError(ctypes.get_errno(), 'renameat2')
script = open({program!r}).read()
way = {way!r}.replace('{{program}}', {program!r}) if 'os.system' in {way!r} else {way!r}
for act in way.split('; '):
    try:
        exec(act)
    except OSError:
        pass
"""


def git(stage, command):
    """A command of the person's, outside."""
    identity = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "safe.directory=*"]
    words = command.split()
    environment = {"PATH": os.environ["PATH"], "HOME": str(stage.place), "GIT_TERMINAL_PROMPT": "0"}
    subprocess.run(
        [words[0], *identity, *words[1:]], cwd=stage.workdir, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip


def repository(stage):
    """One with a commit, and a program of the kernel's beside it."""
    (stage.workdir / "file").write_text("text")
    program = stage.workdir / "program"
    program.write_text(f"#!/bin/sh\n: > {stage.place}/open/marker\n")
    program.chmod(0o755)
    start = "git init", "git config extensions.worktreeConfig true", "git add -A", "git commit -m 1"
    for command in start:
        git(stage, command)
    return str(program)


def use(stage):
    """What a person does then; whether that ran the kernel's program."""
    (stage.workdir / "file").write_text("another text")
    for command in USED.replace("\n", ";").split(";"):
        if command.strip():
            git(stage, command)
    return "run" if (stage.place / "open/marker").exists() else "not run"


def use_plainly(stage, way):
    program = repository(stage)
    stage.patch.chdir(stage.workdir)
    exec(KERNEL.format(program=program, way=way), {})
    return use(stage)


for number, title, way in WAYS:

    @between(
        number, title, Kind.REPOSITORIES, "what git runs for whoever comes after", way,
        needs=("git",), expect="not run", landlock=None, without=use_plainly, control="run",
    )  # fmt: skip
    def leave_in_repository(stage, way):
        program = repository(stage)
        with stage.kernel() as kernel:
            kernel.run(KERNEL.format(program=program, way=way))
        return use(stage)


BELOW = "os.system('git init -q below && cd below && git config core.fsmonitor {program}')"


def use_below(stage, way):
    program = repository(stage)
    stage.patch.chdir(stage.workdir)
    exec(KERNEL.format(program=program, way=way), {})
    stage.workdir = stage.workdir / "below"
    return use(stage)


@between(
    435, "make a repository in a directory below, and wait for git to be run there",
    Kind.REPOSITORIES, "not held back: see SECURITY.md", BELOW,
    needs=("git",), expect="run", landlock=None, without=use_below, control="run",
)  # fmt: skip
def make_repository(stage, way):
    program = repository(stage)
    with stage.kernel() as kernel:
        kernel.run(KERNEL.format(program=program, way=way))
    stage.workdir = stage.workdir / "below"
    return use(stage)


# What a person has done there before, and what the kernel does then.
LED_ELSEWHERE = (
    (437, "change hooks in the work tree to which .git/hooks is a link",
        "mkdir hooks; rm -r .git/hooks; ln -s ../hooks .git/hooks",
        "write('hooks/pre-commit', script, 0o755)"),
    (438, "change hooks in the work tree that core.hooksPath names",
        "mkdir .husky; git config core.hooksPath .husky",
        "write('.husky/pre-commit', script, 0o755)"),
    (439, "make the directory of hooks that core.hooksPath names",
        "git config core.hooksPath hooks/own", "write('hooks/own/pre-commit', script, 0o755)"),
    (440, "change settings in the work tree that .git/config includes",
        "touch shared; git config include.path ../shared", f"write('shared', '{CONFIG}')"),
    (441, "change the repository that a file in place of .git names",
        "mv .git .bare; echo gitdir: .bare > .git", f"write('.bare/config', '{CONFIG}')"),
    (442, "change the repository to which a link in place of .git leads",
        "mkdir -p a/b/c; mv .git a/b/c/d; ln -s a/b/c/d .git",
        f"write('a/b/c/d/config', '{CONFIG}')"),
    (443, "change a program in the work tree that a setting names",
        "echo exit 1 > monitor; chmod +x monitor; git config core.fsmonitor ./monitor",
        "write('monitor', script, 0o755)"),
)  # fmt: skip


def led_elsewhere(stage, before):
    program = repository(stage)
    environment = {"PATH": os.environ["PATH"], "HOME": str(stage.place)}
    subprocess.run(["sh", "-ec", before], cwd=stage.workdir, env=environment, check=True)
    return program


def use_led_plainly(stage, before, way):
    program = led_elsewhere(stage, before)
    stage.patch.chdir(stage.workdir)
    exec(KERNEL.format(program=program, way=way), {})
    return use(stage)


for number, title, before, way in LED_ELSEWHERE:

    @between(
        number, title, Kind.REPOSITORIES, "settings that lead into the work tree", before, way,
        needs=("git",), variants=("root",),
        expect="not run", without=use_led_plainly, control="run",
    )  # fmt: skip
    def change_what_is_named(stage, before, way):
        program = led_elsewhere(stage, before)
        with stage.kernel() as kernel:
            kernel.run(KERNEL.format(program=program, way=way))
        return use(stage)


BESIDE = 8
# As many files as hide it where only so many names of a directory are looked at.
CROWD = 6000


def repositories_beside(stage):
    """Some, in directories of the work directory; the program."""
    program = repository(stage)
    for number in range(BESIDE):
        subprocess.run(["cp", "-a", stage.workdir / ".git", stage.place / f"open/{number}"])
    for number in range(BESIDE):
        (stage.workdir / f"p-{number}").mkdir()
        (stage.place / f"open/{number}").rename(stage.workdir / f"p-{number}/.git")
    return program


CROWDING = f"for number in range({CROWD}): os.mkdir('crowd-%d' % number)"
SPOILING = "; ".join(f"write('p-{n}/.git/config', '{CONFIG}')" for n in range(BESIDE))


def use_all(stage):
    found = []
    for number in range(BESIDE):
        work = SimpleNamespace(workdir=stage.workdir / f"p-{number}", place=stage.place)
        found.append(use(work))
    return "run" if "run" in found else "not run"


def crowd_plainly(stage):
    program = repositories_beside(stage)
    stage.patch.chdir(stage.workdir)
    exec(KERNEL.format(program=program, way=SPOILING), {})
    return use_all(stage)


@between(
    436, "make so many directories that a repository beside them is not found at the next start",
    Kind.REPOSITORIES, "a look that ends somewhere", needs=("git",), variants=("root",),
    expect="not run", without=crowd_plainly, control="run",
)  # fmt: skip
def crowd_out(stage):
    program = repositories_beside(stage)
    with stage.kernel() as kernel:
        kernel.run(f"import os\n{CROWDING}")
    stage.tries(stage.workdir, KERNEL.format(program=program, way=SPOILING))
    return use_all(stage)
