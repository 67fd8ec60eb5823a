"""The same tests, run once more by an ordinary user: with the user's own id, and with a range."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import USER_IDS, WARM
from facilities import public_python
from probes import START

pytestmark = [
    pytest.mark.requires("userns", "root", "setpriv", "public-python"),
    pytest.mark.timeout(300),  # each is a pytest of many tests
]

USER, NAME = 4321, "sbxuser"
FIRST_UID, FIRST_GID = 400_000, 500_000
IDENTITY = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
# What the machine tells of users, in a mount namespace of this test's own.
WITH_FILES = """
cd "$1" && shift
for name in passwd subuid subgid; do mount --bind "$name" "/etc/$name" || exit; done
cd / && exec "$@"
"""
LOOK = """
import sys
from pathlib import Path
import boxes, test_ordinary_user
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime = sys.argv[1:]
with boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))() as box:
    print(box.call(test_ordinary_user.look))
"""


def look():
    import os

    def owner(path):
        status = os.stat(path)
        return status.st_uid, status.st_gid

    open("made", "w").close()
    maps = [open(f"/proc/self/{kind}_map").read().split() for kind in ("uid", "gid")]
    return [*maps, [os.getuid(), os.getgid()], *map(owner, (".", "made", "theirs"))]


@pytest.fixture
def home(public_folder):
    """A home directory of the ordinary user, with our code for them to read."""
    for name in ("work", "run", "base"):
        (public_folder / name).mkdir()
        os.chown(public_folder / name, USER, USER)
    write_files(public_folder, f"{NAME}:{FIRST_UID}:65536\n", f"{USER}:{FIRST_GID}:65536\n")
    return public_folder


def write_files(folder: Path, subuid: str, subgid: str) -> None:
    line = f"{NAME}:x:{USER}:{USER}::{folder}:/bin/sh\n"
    (folder / "passwd").write_text(Path("/etc/passwd").read_text() + line)
    (folder / "subuid").write_text(subuid)
    (folder / "subgid").write_text(subgid)


def as_user(home: Path, *words: str, user_ids: str = "single", warm: str = "") -> str:
    """The output of Python with *words* as the ordinary user."""
    code = home / "code"
    modules = [str(code), f"{code}/tests", f"{code}/tests/inside", *sys.path]
    environment = {
        "PYTHONPATH": os.pathsep.join(modules),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "PATH": os.defpath,
        # A test with a HOME of its own would have packages of its own, and so a nursery.
        "PYTHONUSERBASE": f"{home}/python",
        USER_IDS: user_ids,
        WARM: warm,
    }
    files = ("unshare", "--mount", "sh", "-c", WITH_FILES, "sh", str(home))
    done = subprocess.run(
        [*files, *IDENTITY, public_python(), *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def passed(home: Path, room: str, **options: str) -> int:
    """How many tests of *room* an ordinary user passes; none may fail."""
    folder = home / "code"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={home}/base/t")
    files = ("-c", f"{folder}/pyproject.toml", f"{folder}/tests/{room}")
    told = as_user(home, *words, *files, **options)
    match = re.search(r"(\d+) passed", told)
    return int(match[1]) if match else 0


@pytest.mark.parametrize(
    ("room", "fewest"),
    [
        ("test_bounds", 5),
        ("test_file_system", 25),
        ("test_covers", 15),
        ("test_environments", 2),
        ("test_identity", 8),
        ("test_lifecycle", 8),
        ("test_namespaces", 20),
        ("test_swaps", 10),
        ("test_starts", 30),
        ("test_system_calls", 20),
    ],
)
def test_an_ordinary_user_passes_the_tests_of_the_box(home, room, fewest):
    assert passed(home, f"inside/{room}.py") >= fewest


@pytest.mark.parametrize(
    ("room", "fewest"),
    [
        ("test_bounds", 5),
        ("test_file_system", 25),
        ("test_covers", 15),
        ("test_identity", 8),
        ("test_namespaces", 20),
        ("test_swaps", 8),
        ("test_system_calls", 20),
    ],
)
def test_they_pass_in_boxes_from_a_nursery_too(home, room, fewest):
    assert passed(home, f"inside/{room}.py", warm="1") >= fewest


@pytest.mark.requires("newuidmap")
@pytest.mark.parametrize(
    ("room", "fewest"),
    [
        ("test_file_system", 25),
        ("test_identity", 8),
        ("test_namespaces", 20),
        ("test_starts", 30),
    ],
)
def test_they_pass_with_a_range_of_ids_too(home, room, fewest):
    assert passed(home, f"inside/{room}.py", user_ids="range") >= fewest


@pytest.mark.requires("newuidmap")
def test_a_range_maps_all_ids_but_the_users_own_to_subordinate_ones(home):
    theirs = home / "work/theirs"
    theirs.touch()
    os.chown(theirs, FIRST_UID + 33, FIRST_GID + 44)
    answer = as_user(home, "-c", LOOK, f"{home}/work", f"{home}/run", user_ids="range")
    uids, gids = (
        ["0", str(first), "4321", "4321", "4321", "1", "4322", str(first + 4322), "61214"]
        for first in (FIRST_UID, FIRST_GID)
    )
    own = [USER, USER]
    assert answer.strip().splitlines()[-1] == str([uids, gids, own, own, own, [33, 44]])
    assert (home / "work/made").stat().st_uid == USER


@pytest.mark.requires("newuidmap")
@pytest.mark.parametrize(
    ("subuid", "subgid", "answer"),
    [
        ("", "", f"/etc/subuid gives {NAME} no 65536 ids"),
        (f"{NAME}:100000:65535\n", f"{NAME}:100000:65536\n", "/etc/subuid gives"),
        (f"{NAME}:100000:65536\n", "", "/etc/subgid gives"),
    ],
)
def test_a_range_that_is_not_to_be_had_is_refused_with_the_command(home, subuid, subgid, answer):
    write_files(home, "other:100000:65536\n" + subuid, subgid)
    told = as_user(home, "-c", START, f"{home}/work", f"{home}/run", user_ids="range")
    assert answer in told
    span = "165536-231071"
    assert f"sudo usermod --add-subuids {span} --add-subgids {span} {NAME}" in told
    assert os.listdir(home / "run") == []


ADVICE = """
from sandbox_provisioner.cgroup import survey
facts = survey()
assert facts.missing.keys() >= {"memory", "pids"}, facts.missing
print("\\n".join(facts.remedy("memory")))
"""
BECOME_A_SHELL = "import os, sys; os.execvp('sh', ['sh', '-ec', sys.argv[1]])"


@pytest.mark.requires("cgroup-v1", "cgroup-memory", "cgroup-pids")
def test_what_doctor_advises_on_v1_changes_its_answer(home):
    administrator, _, user = as_user(home, "-c", ADVICE).partition("Then, by yourself,")
    commands = [re.findall(r"^  .*", part, re.M) for part in (administrator, user)]
    made = f"jupyter-{NAME}"
    try:
        # In place of sudo: who runs this is root, but has no such user.
        script = "\n".join(commands[0]).replace("sudo ", "").replace(f"-R {NAME}", f"-R {USER}")
        subprocess.run(["sh", "-ec", script], check=True)
        doctor = f"{public_python()} -m sandbox_provisioner.app doctor --json"
        doctor += f" --runtime-dir={home}/run"
        start = "\n".join(commands[1]).replace("jupyter lab", doctor)
        told = as_user(home, "-c", BECOME_A_SHELL, start)
        checks = {c["facility"]: c for c in json.loads(told[told.index("[\n") :])}
        for facility in ("memory", "pids", "a sandbox starts"):
            check = checks.get(f"{facility} cap") or checks[facility]
            assert check["state"] == "ok", check
        assert made in checks["memory cap"]["found"]
    finally:
        for group in Path("/sys/fs/cgroup").glob(f"*/{made}"):
            for folder in (group / "sandbox-provisioner", group):
                if folder.exists():
                    folder.rmdir()


def test_root_looks_from_the_place_of_another_users_server(home):
    # Root may read the parts of another Python, which are not this one's.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(home / "code"), *ours]),
        "PATH": os.defpath,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    words = ("-m", "sandbox_provisioner.app", "doctor", "--json", f"--runtime-dir={home}/run")
    with subprocess.Popen(
        [*IDENTITY, "sh", "-c", "echo there; exec cat"],
        cwd=home / "work",
        env={"HOME": str(home), "PATH": os.defpath, "SECRET": "not looked at"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        server.stdout.readline()
        done = subprocess.run(
            [public_python(), *words, f"--pid={server.pid}"],
            env=environment, check=False, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {c["facility"]: c["found"] for c in json.loads(done.stdout)}
    assert f"uid {USER}" in found["user namespaces"]
    assert found["work directory"].startswith(f"{home}/work on ")
    assert found["runtime directory"] == f"{home}/run"
    assert found["a sandbox starts"].startswith("Python started and ended")


def test_an_ordinary_user_cannot_look_from_there_and_is_told_who_can(home):
    words = ("sandbox_provisioner.app", "doctor", f"--pid={os.getpid()}")
    script = f"import sys; sys.argv = {list(words)!r}; from sandbox_provisioner.app import main\n"
    told = as_user(
        home, "-c", f"{script}try:\n    main()\nexcept SystemExit as e:\n    print(e.code)"
    )
    assert "Permission denied" in told
    assert f"sudo jupyter sandbox doctor --pid {os.getpid()}" in told
    assert told.splitlines()[-1] == "1"
