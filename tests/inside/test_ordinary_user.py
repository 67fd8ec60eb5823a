"""What only an ordinary user meets: a range of ids, or none, and what root is told of their place.

What else they can do stands in test_variants.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import USER_IDS
from facilities import public_python
from probes import START
from users import FIRST_GID, FIRST_UID, IDENTITY, NAME, USER, as_user, write_files

pytestmark = pytest.mark.requires("userns", "root", "setpriv", "public-python")

RANGE = {USER_IDS: "range"}
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


@pytest.mark.requires("newuidmap")
def test_a_range_maps_all_ids_but_the_users_own_to_subordinate_ones(user_home):
    theirs = user_home / "work/theirs"
    theirs.touch()
    os.chown(theirs, FIRST_UID + 33, FIRST_GID + 44)
    answer = as_user(user_home, "-c", LOOK, f"{user_home}/work", f"{user_home}/run", **RANGE)
    uids, gids = (
        ["0", str(first), "4321", "4321", "4321", "1", "4322", str(first + 4322), "61214"]
        for first in (FIRST_UID, FIRST_GID)
    )
    own = [USER, USER]
    assert answer.strip().splitlines()[-1] == str([uids, gids, own, own, own, [33, 44]])
    assert (user_home / "work/made").stat().st_uid == USER


@pytest.mark.requires("newuidmap")
@pytest.mark.parametrize(
    ("subuid", "subgid", "answer"),
    [
        ("", "", f"/etc/subuid gives {NAME} no 65536 ids"),
        (f"{NAME}:100000:65535\n", f"{NAME}:100000:65536\n", "/etc/subuid gives"),
        (f"{NAME}:100000:65536\n", "", "/etc/subgid gives"),
    ],
)
def test_a_range_that_cannot_be_had_is_refused_with_the_command(user_home, subuid, subgid, answer):
    write_files(user_home, "other:100000:65536\n" + subuid, subgid)
    told = as_user(user_home, "-c", START, f"{user_home}/work", f"{user_home}/run", **RANGE)
    assert answer in told
    span = "165536-231071"
    assert f"sudo usermod --add-subuids {span} --add-subgids {span} {NAME}" in told
    assert os.listdir(user_home / "run") == []


ADVICE = """
from sandbox_provisioner.facilities.caps.cgroup import survey
facts = survey()
assert facts.missing.keys() >= {"memory", "pids"}, facts.missing
print("\\n".join(facts.remedy("memory")))
"""
BECOME_A_SHELL = "import os, sys; os.execvp('sh', ['sh', '-ec', sys.argv[1]])"


@pytest.mark.requires("cgroup-v1", "cgroup-memory", "cgroup-pids")
def test_what_doctor_advises_on_v1_changes_its_answer(user_home):
    administrator, _, user = as_user(user_home, "-c", ADVICE).partition("Then, by yourself,")
    commands = [re.findall(r"^  .*", part, re.M) for part in (administrator, user)]
    made = f"jupyter-{NAME}"
    try:
        # In place of sudo: who runs this is root, but has no such user.
        script = "\n".join(commands[0]).replace("sudo ", "").replace(f"-R {NAME}", f"-R {USER}")
        subprocess.run(["sh", "-ec", script], check=True)
        doctor = f"{public_python()} -m sandbox_provisioner.app doctor --json"
        doctor += f" --runtime-dir={user_home}/run"
        start = "\n".join(commands[1]).replace("jupyter lab", doctor)
        told = as_user(user_home, "-c", BECOME_A_SHELL, start)
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


def test_root_looks_from_the_place_of_another_users_server(user_home):
    # Root may read the parts of another Python, which are not this one's.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(user_home / "code"), *ours]),
        "PATH": os.defpath,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    words = ("-m", "sandbox_provisioner.app", "doctor", "--json", f"--runtime-dir={user_home}/run")
    with subprocess.Popen(
        [*IDENTITY, "sh", "-c", "echo there; exec cat"],
        cwd=user_home / "work",
        env={"HOME": str(user_home), "PATH": os.defpath, "SECRET": "not looked at"},
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
    assert found["work directory"].startswith(f"{user_home}/work on ")
    assert found["runtime directory"] == f"{user_home}/run"
    assert found["a sandbox starts"].startswith("Python started and ended")


def test_an_ordinary_user_cannot_look_from_there_and_is_told_who_can(user_home):
    words = ("sandbox_provisioner.app", "doctor", f"--pid={os.getpid()}")
    script = f"import sys; sys.argv = {list(words)!r}; from sandbox_provisioner.app import main\n"
    told = as_user(
        user_home, "-c", f"{script}try:\n    main()\nexcept SystemExit as e:\n    print(e.code)"
    )
    assert "Permission denied" in told
    assert f"sudo jupyter sandbox doctor --pid {os.getpid()}" in told
    assert told.splitlines()[-1] == "1"
