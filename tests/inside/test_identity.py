"""Attempted escapes: through who the kernel's process is, and what it may do as that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from facilities import public_python
from probes import answer_of, children_of

pytestmark = pytest.mark.requires("userns")

OTHER = 4321


def status():
    with open("/proc/self/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def test_no_capability_is_left_in_any_set(run_inside):
    found = run_inside(status)
    sets = {name: int(found[name], 16) for name in found if name.startswith("Cap")}
    assert sets == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)


def test_no_new_privileges_and_a_system_call_filter_are_in_force(run_inside):
    found = run_inside(status)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.requires("root")
def test_no_supplementary_group_is_left(run_inside):
    def groups():
        import os

        return os.getgroups(), answer_of(lambda: os.setgroups([0]))

    assert run_inside(groups, using=(answer_of,)) == [[], "EPERM"]


def test_no_other_user_can_be_become(run_inside):
    def become():
        import os

        calls = (os.setuid, os.setgid, os.seteuid, os.setegid)
        return [answer_of(lambda c=call: c(0)) for call in calls]

    if os.geteuid() == 0:
        assert run_inside(become, using=(answer_of,)) == ["EPERM"] * 4


@pytest.mark.requires("root")
def test_the_user_inside_is_nobody_of_the_host(sandbox):
    with sandbox() as box:
        init = ids_of(box.handle.pid)
        kernels = [ids_of(pid) for pid in children_of(box.handle.pid)]
        first = box.handle.record.first_id
    assert first >= 0x70000000
    assert init == {first}
    assert kernels == [{first + 1000}]


def ids_of(pid):
    """All user and group ids of *pid*, as the host sees them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [line.split()[1:] for line in lines if line.startswith(("Uid:", "Gid:"))]
    return {int(word) for words in found for word in words}


@pytest.mark.requires("root")
def test_two_sandboxes_have_different_users_on_the_host(sandbox, new_folder):
    with sandbox() as one, sandbox(workdir=new_folder()) as other:
        users = [ids_of(pid) for box in (one, other) for pid in children_of(box.handle.pid)]
    assert len(users) == 2
    assert not users[0] & users[1]


@pytest.mark.requires("root")
@pytest.mark.parametrize("owner", [0, OTHER])
def test_files_made_inside_belong_to_the_owner_of_the_work_directory(sandbox, workdir, owner):
    def make_files():
        import os

        os.mkdir("folder")
        open("folder/file", "w").close()
        os.symlink("file", "folder/link")
        os.mkfifo("fifo")
        return os.stat("folder").st_uid == os.getuid() == os.stat(".").st_uid

    os.chown(workdir, owner, owner)
    with sandbox() as box:
        assert box.call(make_files)
    made = [workdir / name for name in ("folder", "folder/file", "folder/link", "fifo")]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in made} == {(owner, owner)}


@pytest.mark.requires("root")
def test_a_file_of_another_user_stays_closed_and_cannot_be_taken_over(run_inside, workdir):
    def take_over():
        import os

        return [
            answer_of(lambda: open("secret")),
            answer_of(lambda: os.chown("secret", os.getuid(), os.getgid())),
            answer_of(lambda: os.chmod("secret", 0o777)),
        ]

    secret = workdir / "secret"
    secret.write_text("mine")
    secret.chmod(0o600)
    os.chown(workdir, OTHER, OTHER)
    assert run_inside(take_over, using=(answer_of,)) == [
        "EACCES",
        "EPERM",
        "EOVERFLOW",  # chmod(2) of an owner that has no number inside
    ]


def test_no_file_can_be_made_to_run_as_its_owner(run_inside, workdir):
    def make_set_id():
        import os

        def make(name, mode):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, mode))

        open("program", "w").close()
        os.mkdir("folder")
        return [
            answer_of(lambda: os.chmod("program", 0o4755)),
            answer_of(lambda: os.chmod("program", 0o2755)),
            answer_of(lambda: os.chmod("program", 0o6777)),
            answer_of(lambda: os.chmod("program", 0o4755, follow_symlinks=True)),
            answer_of(lambda: os.fchmod(os.open("program", os.O_RDONLY), 0o4755)),
            answer_of(lambda: make("born", 0o4755)),
            answer_of(lambda: os.mkfifo("born-fifo", 0o4755)),
        ]

    answers = run_inside(make_set_id, using=(answer_of,))
    assert set(answers) == {"EPERM"}, answers
    set_id = [path for path in workdir.rglob("*") if path.lstat().st_mode & 0o6000]
    assert set_id == []


def test_a_directory_is_made_without_these_bits_and_has_its_parents_group(run_inside, workdir):
    """mkdir(2) leaves them out by itself; in a set-group-ID directory Linux hands it on."""

    def make():
        import os

        os.mkdir("wished", 0o6775)
        os.mkdir("shared/inner")
        open("shared/file", "w").close()
        return [os.stat(name).st_mode & 0o6000 for name in ("wished", "shared/inner")]

    (workdir / "shared").mkdir()
    os.chown(workdir / "shared", -1, workdir.stat().st_gid)
    (workdir / "shared").chmod(0o2775)
    assert run_inside(make) == [0, 0o2000]
    assert (workdir / "wished").stat().st_mode & 0o6000 == 0
    assert (workdir / "shared/file").stat().st_mode & 0o6000 == 0


@pytest.mark.requires("root")
def test_a_set_id_program_of_the_host_gives_nothing(run_inside, workdir):
    def run_it():
        import subprocess

        return subprocess.run(
            ["./program", "-u"], check=True, capture_output=True, text=True
        ).stdout

    program = workdir / "program"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    assert run_inside(run_it) == "1000\n"


@pytest.mark.requires("root")
def test_root_inside_is_not_even_in_the_password_file_with_a_shell(run_inside):
    def entries():
        import pwd

        return {e.pw_name: (e.pw_uid, e.pw_shell) for e in pwd.getpwall()}

    assert run_inside(entries) == {
        "root": [0, "/usr/sbin/nologin"],
        "jovyan": [1000, "/bin/bash"],
        "nobody": [65534, "/usr/sbin/nologin"],
    }


# -- what the server knows and the kernel must not


def test_the_environment_holds_nothing_of_the_servers(run_inside, monkeypatch):
    def variables():
        import os

        return dict(os.environ), open("/proc/self/environ").read()

    secrets = ("JUPYTERHUB_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "SOME_PASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, "s3cret")
    environment, raw = run_inside(variables, environment=dict(os.environ))
    assert "s3cret" not in raw
    assert not set(secrets) & set(environment)


def test_a_core_dump_is_not_to_be_had(run_inside):
    def limits():
        import resource

        return resource.getrlimit(resource.RLIMIT_CORE)

    assert run_inside(limits) == [1, 1]


def test_no_limit_can_be_raised(run_inside):
    def raise_limits():
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        more = (hard + 1, hard + 1)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, more)
        except (ValueError, OSError):
            return "refused"
        return "raised"

    assert run_inside(raise_limits) == "refused"


def test_no_priority_can_be_raised(run_inside):
    def raise_priority():
        import os

        fifo = os.sched_param(1)
        return [
            answer_of(lambda: os.nice(-1)),
            answer_of(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20)),
            answer_of(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, fifo)),
            answer_of(lambda: os.sched_setscheduler(0, os.SCHED_RR, fifo)),
        ]

    answers = run_inside(raise_priority, using=(answer_of,))
    assert set(answers) <= {"EPERM", "EACCES"}, answers


def test_the_oom_score_cannot_be_lowered_below_the_servers(run_inside):
    def lower():
        path = "/proc/self/oom_score_adj"
        before = int(open(path).read())
        for score in range(before - 1, -1001, -1):
            try:
                with open(path, "w") as file:
                    file.write(str(score))
            except PermissionError:
                break
        return before, int(open(path).read())

    before, after = run_inside(lower)
    assert before == 300
    assert after >= int(Path("/proc/self/oom_score_adj").read_text())


# -- the same, started by an ordinary user


ORDINARY = """
import json, os, sys
from pathlib import Path
import boxes, probes, test_identity
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime = sys.argv[1:]
with boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))() as box:
    found = box.call(test_identity.status)
    box.call(test_identity.make_a_file)
names = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Uid")
print(json.dumps([found[name] for name in names]))
"""


def make_a_file():
    open("made", "w").close()


@pytest.mark.requires("root", "setpriv", "public-python")
def test_an_ordinary_user_gets_the_same_box(new_folder):
    workdir, runtime = new_folder(), new_folder()
    for path in (workdir, runtime):
        os.chown(path, OTHER, OTHER)
    answer = as_user(OTHER, ORDINARY, str(workdir), str(runtime))
    assert json.loads(answer) == ["0" * 16, "0" * 16, "1", "2", "\t".join([str(OTHER)] * 4)]
    assert (workdir / "made").stat().st_uid == OTHER


def as_user(uid, script, *words):
    """Run the Python *script* as an ordinary user with an id and nothing else; its output."""
    identity = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    done = subprocess.run(
        [*identity, public_python(), "-c", script, *words],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "HOME": words[0], "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
