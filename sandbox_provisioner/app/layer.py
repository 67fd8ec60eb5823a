"""app/layer.py - a command of its own: `jupyter sandbox layer`, what kernels have installed."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from traitlets import Bool

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    OPTION_ALIASES,
    SandboxCommand,
    spoken,
)
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.broker.kept_through import layers_through, reset_through
from sandbox_provisioner.errors import SandboxError, SpecError, did_you_mean
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers.kept import Holder, KeptFolder, layers_of, reset, told_of
from sandbox_provisioner.layers.place import layer_path
from sandbox_provisioner.units import format_bytes

_ALIASES = {**COMMON_ALIASES, "layer-dir": OPTION_ALIASES["layer-dir"]}
_FLAGS = {**COMMON_FLAGS, "json": ({"LayerApp": {"json_output": True}}, "Print JSON.")}
Found = tuple[KeptFolder, Holder]
# The names of those that a broker keeps begin so.
BROKERS = "broker/"


class LayerApp(SandboxCommand):
    """Lists a user's layers, or empties one."""

    usage = "jupyter sandbox layer list|reset [NAME] [--json]"
    description = (
        'What the kernels with layer = "user" have installed, which is kept for the next ones: '
        "list shows the layer over each root, how much it takes, and who has it, or had it last; "
        "reset removes one, so that the next kernel begins with an empty one. Nothing in a layer "
        "is run or read by this command."
    )
    examples = """
    jupyter sandbox layer list
    jupyter sandbox layer reset host
    jupyter sandbox layer reset broker/host
    """
    json_output = Bool(False, help="Print JSON.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`; SpecError where there is no such layer, HostError if a kernel has
        it."""
        options = self.provisioner()
        own = list(layers_of(layer_path(options.layer_dir), os.geteuid()))
        path = options.broker_socket
        path = path if os.geteuid() and os.path.exists(path) else ""
        match self.extra_args:
            case ["list"]:
                told = [*(told_of(*one) for one in own), *_of_broker(path)]
                print(json.dumps(told, indent=1) if self.json_output else as_text(told))
            case ["reset", name]:
                if path and name.startswith(BROKERS):
                    reset_through(path, name.removeprefix(BROKERS))
                else:
                    reset(*_named(name, own))
                print(f"Removed the layer {one_line(name)}: the next kernel begins anew.")
            case _:
                raise self.wrong("write list, or reset and the name of a layer")


def _of_broker(path: str) -> list[dict[str, Any]]:
    """What the broker at *path* keeps for this user; none where there is none."""
    if not path:
        return []
    try:
        found = layers_through(path)
    except SandboxError as error:
        print(spoken(str(error)), file=sys.stderr)
        return []
    return [{**one, "name": f"{BROKERS}{one['name']}"} for one in found]


def _named(name: str, found: list[Found]) -> Found:
    names = [folder.path.name for folder, _ in found]
    if name not in names:
        known = f"Layers are: {', '.join(names)}." if names else "There are none."
        raise SpecError(
            attempt=f"find the layer {one_line(name)!r}",
            answer="there is none of that name",
            remedy=did_you_mean(name, names, known),
        )
    return found[names.index(name)]


def as_text(told: list[dict[str, Any]]) -> str:
    """For people."""
    if not told:
        return "No layer is kept."
    head = ("layer", "root", "size", "files", "kernel", "since")
    rows = [
        (
            one["name"],
            one["root"],
            format_bytes(one["size_bytes"]),
            str(one["files"]),
            f"{one['kernel']} {'has it' if one['held'] else 'had it last'}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one["since"])),
        )
        for one in told
    ]
    return table([head, *rows])
