"""working.py - a program in the box of a hub user's server: kernels of its own root, and reviewed.

Its word is a directory to be their root. It writes as JSON what it has found.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from sandbox_provisioner.app import review

WORK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "work")
WHAT = """
import os
print(open("/etc/os-release").readline(), os.stat("/usr").st_uid, end=" ")
open("new", "w").write("by the kernel")
os.remove("gone")
"""


def run(code: str, **options: Any) -> str:
    """What *code* prints in a new kernel, which is ended."""
    stanza = {"provisioner_name": "sandbox-provisioner", "config": options}
    manager = KernelManager(shutdown_wait_time=60.0)
    manager._kernel_spec = KernelSpec(
        argv=["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="boxed", language="python", metadata={"kernel_provisioner": stanza},
    )  # fmt: skip
    manager.start_kernel(cwd=WORK)
    client = manager.client()
    client.start_channels()
    told: list[str] = []

    def hear(message: Any) -> None:
        content = message["content"]
        told.append(content.get("text") or "\n".join(content.get("traceback", [])))

    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(code, output_hook=hear, timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    return "".join(told)


def told(which: str, *words: str) -> str:
    """What a command prints."""
    app = getattr(review, which)(argv=[], config=None)
    app.initialize([*words])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app.start()
    return out.getvalue()


def main(root: str) -> None:
    os.mkdir(WORK)
    open(f"{WORK}/gone", "w").close()
    said = run(WHAT, rootfs=root, workdir_mode="review")
    before = sorted(os.listdir(WORK))
    [waiting] = json.loads(told("DiffApp", "--json"))
    kept = told("KeepApp", waiting["sandbox_id"])
    after = {path.name: path.read_text() for path in Path(WORK).iterdir()}
    print(json.dumps([said.split(), before, kept, after, told("DiffApp")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
