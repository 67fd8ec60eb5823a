"""``python -m tests.vm.by_hand.containers docker|podman``: a real hub with DockerSpawner, by the
configuration that docs/jupyterhub.md has, two users, and kernels in boxes in their containers.

Not in the virtual machine, but on the host, as root, in namespaces of its own: network, mounts and
processes end with this. Images and containers lie in a temporary folder. Needs the engine (dockerd
or podman), mmdebstrap, npm and node, and the environment of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from requests.exceptions import ConnectionError

from tests.vm.by_hand import in_guest
from tests.vm.by_hand.__main__ import ENVIRONMENT, PACKAGES, proxy
from tests.vm.environments import CACHE, REPOSITORY, environment

# What tells the process in the namespaces where the others' things are.
FOLDER = "SANDBOX_TESTS_FOLDER"
ADDRESS = "10.99.0.1"
MACHINE = f"""
ip link set lo up
ip link add machine type bridge
ip address add {ADDRESS}/24 dev machine
ip link set machine up
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/user
umount /sys/fs/cgroup/unified 2>/dev/null || true  # crun takes no hybrid of v1 and v2
"""
SERVICES = {
    "docker": "dockerd --data-root {0}/root --exec-root {0}/run --pidfile {0}/pid -H {1}",
    "podman": "podman --root {0}/root --runroot {0}/run --tmpdir {0}/tmp --cgroup-manager cgroupfs "
    "--events-backend file system service --time=0 {1}",
}
IMAGE = "my/image"
ARCHIVE = CACHE / "container.tar"
CHANGES = [
    "USER jovyan", "WORKDIR /home/jovyan", f"ENV PATH={ENVIRONMENT}/bin:/usr/bin:/bin",
    'CMD ["jupyterhub-singleuser"]',
]  # fmt: skip
PATIENCE_SECONDS = 120
CONFIG = in_guest.CONFIG.replace("should_start = False", "should_start = True")
LOOK = f"""
import json, os, socket
def answer_of_hub():
    try:
        socket.create_connection(("{ADDRESS}", 8081), 5).close()
    except OSError as error:
        return error.strerror
open("by-kernel", "w").close()
print(json.dumps({{
    "seccomp": open("/proc/self/status").read().split("Seccomp:")[1].split()[0],
    "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "tokens": [name for name in os.environ if "TOKEN" in name],
    "hub": answer_of_hub(),
}}))
"""


def main() -> None:
    """Make the image, and then all else where nothing of it is this machine's."""
    [engine] = sys.argv[1:]
    if given := os.environ.get(FOLDER):
        run_here(engine, Path(given))
        return
    with tempfile.TemporaryDirectory(prefix="sbx-containers-") as folder:
        make_image(Path(folder, "image"))
        namespaces = "--net --mount --pid --fork --kill-child --mount-proc"
        again = [sys.executable, "-m", "tests.vm.by_hand.containers", engine]
        command = ["unshare", *namespaces.split(), *again]
        subprocess.run(command, env={**os.environ, FOLDER: folder}, check=True)


def run_here(engine: str, folder: Path) -> None:
    """In namespaces that end with this process, and end the engine."""
    subprocess.run(["sh", "-ec", MACHINE], check=True)
    url = f"unix://{folder}/socket"
    subprocess.Popen(SERVICES[engine].format(folder, url).split())
    run(engine, folder, url)


def make_image(root: Path) -> None:
    """A Debian with Python, our environment and root's configuration, and an ordinary user."""
    debian = "unshare --mount mmdebstrap --variant=minbase --include=python3,adduser bookworm"
    subprocess.run([*debian.split(), root, "http://deb.debian.org/debian"], check=True)
    add = ["chroot", root, "/usr/sbin/useradd", "--create-home", "--uid=1000", "jovyan"]
    subprocess.run(add, check=True)
    made = environment("containers", PACKAGES, ENVIRONMENT)
    shutil.copytree(made, root / ENVIRONMENT.lstrip("/"), symlinks=True)
    servers, lab, *_ = in_guest.code_of("What every server needs", "python")
    jupyter = root / "etc/jupyter"
    jupyter.mkdir()
    servers = "".join(line for line in servers.splitlines(True) if "mem_limit" not in line)
    (jupyter / "jupyter_server_config.py").write_text(servers)
    (jupyter / "jupyter_lab_config.py").write_text(lab)
    subprocess.run(["tar", "-C", root, "-cf", ARCHIVE, "."], check=True)


def run(engine: str, folder: Path, url: str) -> None:
    client = answering(docker.APIClient(base_url=url, version="1.41", timeout=600))
    client.import_image_from_file(str(ARCHIVE), repository=IMAGE, changes=CHANGES)
    hub = start_hub(engine, folder, url)
    try:
        in_guest.await_hub()
        for person in in_guest.PEOPLE:
            in_guest.begin(person)
            told = json.loads(in_guest.Kernel(person).run(LOOK))
            print(engine, person, told, flush=True)
            assert (told["seccomp"], told["processes"], told["tokens"]) == ("2", 2, []), told
            assert told["hub"] == "Network is unreachable", told
            assert "by-kernel" in inside(client, f"jupyter-{person}", "ls -l /home/jovyan")
        for person in in_guest.PEOPLE:
            in_guest.ask("DELETE", f"/hub/api/users/{person}/server")
            while in_guest.ask("GET", f"/hub/api/users/{person}")["servers"]:
                time.sleep(1)
        assert not client.containers(all=True)
    finally:
        hub.terminate()
        for container in client.containers(all=True):
            client.remove_container(container["Id"], force=True)
    print(f"{engine} {client.version()['Version']}: all as the page says")


def answering(client: docker.APIClient) -> docker.APIClient:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            client.ping()
        except (DockerException, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return client


def start_hub(engine: str, folder: Path, url: str) -> subprocess.Popen[bytes]:
    dockers, podmans, *_ = in_guest.code_of("Docker and Kubernetes", "python")
    text = dockers + (podmans if engine == "podman" else "")
    place = folder / "hub"
    place.mkdir()
    configuration = place / "jupyterhub_config.py"
    configuration.write_text(text.replace("192.0.2.10", ADDRESS) + CONFIG)
    programs = [str(Path(sys.executable).parent), str(proxy() / "node_modules/.bin")]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "jupyterhub", "-f", str(configuration)],
        cwd=place, env={**os.environ, "PATH": path, "DOCKER_HOST": url},
    )  # fmt: skip


def inside(client: docker.APIClient, container: str, command: str) -> str:
    """What *command* says in *container*."""
    made: Any = client.exec_create(container, command)
    return str(client.exec_start(made["Id"]).decode())


if __name__ == "__main__":
    in_guest.PAGE = REPOSITORY / "docs/jupyterhub.md"
    in_guest.PATIENCE_SECONDS = PATIENCE_SECONDS
    main()
