"""app/twins.py - pure but for `write_twin`: the sandboxed twin of an installed kernel."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec

from sandbox_provisioner.app.command import stanza_of
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.spec import Confinement
from sandbox_provisioner.unboxed import guarded_command, inner_command


def twin_of(
    kernel: KernelSpec, options: Mapping[str, Any], *, name: str, display_name: str = ""
) -> dict[str, Any]:
    """The kernel.json of the twin *name*: same kernel, started by our provisioner with *options*.

    Raises SpecError where *kernel* is a twin itself, or is started by somebody else's provisioner.
    """
    _refuse_started_elsewhere(kernel)
    twin = kernel.to_dict()
    twin["argv"] = guarded_command(kernel.argv, sys.executable, name)
    twin["display_name"] = display_name or f"{kernel.display_name} ({_box_of(options)})"
    stanza = {"provisioner_name": PROVISIONER, "config": dict(options)}
    twin["metadata"] = {**kernel.metadata, "kernel_provisioner": stanza}
    return {name: value for name, value in twin.items() if value not in ("", {})}


def _box_of(options: Mapping[str, Any]) -> str:
    """What front ends shall say of the twin: the weaker box by its name."""
    return confiner(options.get("confinement") or Confinement.NAMESPACES).shown_as


def _refuse_started_elsewhere(kernel: KernelSpec) -> None:
    name = stanza_of(kernel.metadata).get("provisioner_name", "local-provisioner")
    attempt = f"make a sandboxed twin of {kernel.display_name!r}"
    if name == PROVISIONER or inner_command(kernel.argv) != kernel.argv:
        raise SpecError(
            attempt=attempt,
            answer="it runs in a sandbox already",
            remedy=f"Change its options in {kernel.resource_dir}/kernel.json, "
            "or name the kernel that it was made from with --kernel.",
        )
    if name != "local-provisioner":
        raise SpecError(
            attempt=attempt,
            answer=f"it is not started on this machine by Jupyter itself, but by {name!r}",
            remedy="Name a kernel that is with --kernel.",
        )


def write_twin(kernel: KernelSpec, twin: Mapping[str, Any], folder: Path) -> None:
    """Make *folder* with the twin's kernel.json beside the kernel's own logos, scripts and so on.

    {resource_dir} in an argv means the folder that the kernel.json lies in, so it stays valid.
    """
    source = kernel.resource_dir
    if source and Path(source).is_dir():
        ours = shutil.ignore_patterns("kernel.json", "__pycache__")
        shutil.copytree(source, folder, ignore=ours)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps(twin, indent=1, ensure_ascii=False) + "\n")
