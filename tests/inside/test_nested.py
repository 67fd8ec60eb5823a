"""In a container: a root that is not the machine's starts sandboxes, or reads what forbids them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from facilities import public_python
from probes import START, number_of

pytestmark = pytest.mark.requires("userns", "root", "unshare")

REPOSITORY = Path(__file__).parents[2]
SUBORDINATE = 300_000
# A container's root: of user, mount and PID namespaces that somebody else made.
CONTAINER = ("unshare", "-Urmpf", "--mount-proc")
# user_namespaces(7): the limit of a user namespace holds for all that is made inside of it.
FORBID = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
MASK = """
mount --bind /dev/null /proc/interrupts && mount -t tmpfs -o ro,size=0 none /proc/bus &&
exec unshare -Ur "$@"
"""
# The same with 65536 ids of the host's, as engines without root make it.
WITH_IDS = f"""
import os, sys
from sandbox_provisioner.facilities.ids import inside as ids
from sandbox_provisioner.inside.box import Box
box = Box(-1, -1)
ids.make_user_namespace(box, "container", *["0 {SUBORDINATE} 65536"] * 2)
ids.enter_user_namespace(box, "container")
os.execv(sys.argv[1], ["unshare", "-mpf", "--mount-proc", *sys.argv[2:]])
"""
LOOK = """
import json, os, sys
from pathlib import Path
import boxes, test_nested
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime = sys.argv[1:]
with boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))() as box:
    print(json.dumps(box.call(test_nested.look)))
"""
# seccomp(2): load the number of the call; if it is that *number*, the answer is EPERM.
FILTER = """
import struct
from sandbox_provisioner.inside import kernel_calls
statements = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}),
              (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
kernel_calls.set_no_new_privileges()
kernel_calls.load_filter(b"".join(struct.pack("HBBI", *words) for words in statements))
"""
FILTERED = FILTER.format(number=number_of("unshare")) + START
NAMELESS = FILTER.format(number=number_of("sethostname")) + LOOK
KERNEL = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3-sandbox", cwd=sys.argv[1])
try:
    client.execute_interactive("import os; print('kernel of', os.getuid(), os.getpid())")
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def look():
    import os

    open("made", "w").close()
    status = open("/proc/self/status").read()
    capabilities = {line.split()[1] for line in status.splitlines() if line.startswith("Cap")}
    return {
        "ids": [os.getuid(), os.getgid()],
        "owner": [os.stat(".").st_uid, os.stat("made").st_uid],
        "map": open("/proc/self/uid_map").read().split(),
        "capabilities": sorted(capabilities),
        "processes": sorted(filter(str.isdecimal, os.listdir("/proc"))),
        "host": os.path.exists("/var/log") or os.path.exists("/etc/shadow"),
    }


def run(*command: str, code: Path = REPOSITORY, **environment: str) -> str:
    """The output of *command*, which has our modules from *code*."""
    modules = [str(code), f"{code}/tests", f"{code}/tests/inside", *sys.path]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(modules), **environment},
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def script(text: str, *words: object, python: str = sys.executable) -> tuple[str, ...]:
    return (python, "-c", text, *map(str, words))


def test_a_containers_root_starts_one_in_which_nobody_is_root(workdir, new_folder):
    found = json.loads(run(*CONTAINER, *script(LOOK, workdir, new_folder())))
    assert found == {
        "ids": [1000, 1000],
        "owner": [1000, 1000],
        "map": ["1000", "0", "1"],
        "capabilities": ["0" * 16],
        "processes": found["processes"],
        "host": False,
    }
    assert len(found["processes"]) == 2
    assert (workdir / "made").stat().st_uid == 0


@pytest.mark.requires("public-python")
def test_a_container_with_ids_of_its_own_starts_one_too(workdir, new_folder, public_folder):
    runtime = new_folder()
    for path in (workdir, runtime):
        os.chown(path, SUBORDINATE, SUBORDINATE)
    words = script(LOOK, workdir, runtime, python=public_python())
    command = script(WITH_IDS, shutil.which("unshare"), *words)
    found = json.loads(run(*command, code=public_folder / "code", HOME="/nonexistent"))
    assert (found["ids"], found["map"]) == ([1000, 1000], ["1000", "0", "1"])
    assert (workdir / "made").stat().st_uid == SUBORDINATE


@pytest.mark.requires("cgroup-memory", "cgroup-cpu", "cgroup-pids")
def test_doctor_and_a_kernel_work_in_a_container(workdir, new_folder, runtime_dir):
    installed = new_folder()
    (installed / "kernels").mkdir()
    (installed / "kernels/python3-sandbox").symlink_to(REPOSITORY / "kernelspecs/python3-sandbox")
    environment = {
        "JUPYTER_PATH": str(installed),
        "JUPYTER_RUNTIME_DIR": str(runtime_dir),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = (sys.executable, "-m", "sandbox_provisioner.app", "doctor", "--json")
    checks = {check["facility"]: check for check in json.loads(run(*CONTAINER, *words))}
    assert checks["a sandbox starts"]["state"] == checks["user namespaces"]["state"] == "ok"
    assert "container's root" in checks["user ids of kernels"]["found"]
    assert run(*CONTAINER, *script(KERNEL, workdir), **environment) == "kernel of 1000 2\n"


def test_a_masked_proc_is_named_with_the_setting_that_unmasks_it(workdir, new_folder):
    words = ("unshare", "-mpf", "--mount-proc", "sh", "-c", MASK, "sh")
    told = run(*words, *script(START, workdir, new_folder()), KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert "[mount /proc] fsmount(name='proc'" in told
    assert "masked here (/proc/bus, /proc/interrupts)" in told
    assert "procMount: Unmasked" in told
    assert "hostUsers: false" in told


def test_forbidden_user_namespaces_are_named_with_their_setting(workdir, new_folder):
    words = ("unshare", "-Ur", "sh", "-c", FORBID, "sh")
    told = run(*words, *script(START, workdir, new_folder()))
    assert "the sysctl user.max_user_namespaces is 0. As administrator: echo" in told


def test_any_other_forbidden_namespace_is_named_too(workdir, new_folder):
    forbid = FORBID.replace("max_user", "max_uts")
    words = ("unshare", "-Ur", "sh", "-c", forbid, "sh")
    told = run(*words, *script(START, workdir, new_folder()))
    assert "the sysctl user.max_uts_namespaces is 0" in told


@pytest.mark.parametrize("words", [(), CONTAINER], ids=["machine", "container"])
def test_a_containers_filter_is_named_with_the_setting_that_lifts_it(workdir, new_folder, words):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    told = run(*words, *script(FILTERED, workdir, new_folder()), **pod)
    assert "unshare(flags=" in told
    assert "the system call filter (seccomp) of a Kubernetes pod forbids new namespaces" in told
    assert "seccompProfile: {type: Unconfined}" in told


def test_a_containers_filter_that_only_forbids_to_set_the_name_keeps_no_box_from_starting(
    workdir, new_folder
):
    found = json.loads(run(*CONTAINER, *script(NAMELESS, workdir, new_folder())))
    assert (found["ids"], found["capabilities"]) == ([1000, 1000], ["0" * 16])


def test_no_refused_start_leaves_anything(workdir, new_folder):
    runtime = new_folder()
    run("unshare", "-Ur", "sh", "-c", FORBID, "sh", *script(START, workdir, runtime))
    run(*script(FILTERED, workdir, runtime))
    assert os.listdir(workdir) == []
    assert set(os.listdir(runtime)) <= {"lock"}
