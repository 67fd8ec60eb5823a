"""``python -m tests.vm.by_hand [NAME…]``: real hubs in the virtual machine, by the configurations
that docs/jupyterhub.md has.

Not in CI: JupyterHub takes minutes to start there. *NAME* is local, systemd, ours, account (a hub
that is not root) or, with systemd 254 ($VM_SUITE), subgroup. Needs what `python -m tests.vm` needs,
npm and node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.vm.environments import CACHE, REPOSITORY, environment

HERE = Path(__file__).parent
VM = HERE.parent / "vm"
PACKAGES = ("jupyterhub", "jupyterhub-systemdspawner", "jupyterlab", "websocket-client", "requests")
# Where the environment is in the guest, as each page has it: root's, as an administrator makes one.
ENVIRONMENT = "/opt/jupyter"
ENVIRONMENTS = {"account": "/opt/sandbox"}


def main() -> int:
    """Run the hubs; the exit status is 0 if each did what its page says."""
    names = sys.argv[1:] or ["local", "systemd", "ours", "account"]
    os.environ["VM_NAME"] = f"by-hand-{os.getpid()}"
    places = {name: ENVIRONMENTS.get(name, ENVIRONMENT) for name in names}
    return max(
        in_one_guest(place, [name for name in names if places[name] == place])
        for place in dict.fromkeys(places.values())
    )


def in_one_guest(place: str, names: list[str]) -> int:
    """Run those whose environment is at *place*; the exit status."""
    shares = {prepared(place): place, proxy(): "/opt/proxy", HERE: "/opt/by_hand"}
    shares[REPOSITORY / "docs"] = "/opt/docs"
    words = [f"{source}:{target}:copy" for source, target in shares.items()]
    try:
        start = [word for share in words for word in ("--share", share)]
        subprocess.run([str(VM), "start", *start], check=True)
        return max([run(name, place) for name in names])
    finally:
        subprocess.run([str(VM), "stop"], check=True)


def prepared(place: str) -> Path:
    """With what a hub and its servers need, and our own."""
    made = environment("hubs", PACKAGES, place)
    # A grammar that jsonschema builds at each import, if it can: half of the time of a start.
    for path in made.glob("lib/python3*/site-packages/rfc3987_syntax/__init__.py"):
        path.write_text("raise ImportError\n")
    return made


def proxy() -> Path:
    """JupyterHub's own, and the node that runs it."""
    made = CACHE / "hub-proxy"
    if not (made / "node").exists():
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(made)]
        subprocess.run([*npm, "configurable-http-proxy@5"], check=True)
        shutil.copy(shutil.which("node") or "node", made / "node")
    return made


def run(name: str, place: str) -> int:
    print(f"by_hand: {name}", flush=True)
    words = [f"{place}/bin/python", "-u", "/opt/by_hand/in_guest.py", name]
    return subprocess.run([str(VM), "run", "--", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
