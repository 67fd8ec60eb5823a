"""app/network.py - a command of its own: `jupyter sandbox network`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from traitlets import Bool

from sandbox_provisioner.app.command import COMMON_ALIASES, COMMON_FLAGS, SandboxCommand
from sandbox_provisioner.app.running import Sandbox, look_at_all, places_of_others
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.facilities.network.tell.said import (
    as_option,
    as_rules,
    by_traffic,
    only_refused,
    summary,
)
from sandbox_provisioner.handle import short_id
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.units import format_bytes

_FLAGS = {**COMMON_FLAGS, "json": ({"NetworkApp": {"json_output": True}}, "Print JSON.")}
_HEAD = ("with whom", "connections", "down", "up", "refused")
_OF_A_KERNEL = {"kernel", "spare"}


class NetworkApp(SandboxCommand):
    """Shows with whom one kernel has spoken."""

    usage = "jupyter sandbox network KERNEL [--json]"
    description = (
        "Show what has gone over the network of a kernel that runs, by name: with whom, over how "
        "many connections, how much in each direction, and what was refused; then what was let "
        "through as network_allow, to be pasted, and by itself what was only refused. KERNEL is "
        "its id as jupyter sandbox list shows it, or the beginning of it, or its notebook. With "
        "network_audit every name that it looks up counts as let through, also one with which no "
        "connection was made."
    )
    examples = """
    jupyter sandbox network 134530eb
    jupyter sandbox network analysis.ipynb --json | jq '.names | keys'
    """
    json_output = Bool(False, help="Print JSON: the fields stand in docs/network.md.").tag(
        config=True
    )
    aliases = COMMON_ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`; SpecError where there is no such kernel, or it has no network."""
        if len(self.extra_args) != 1:
            raise self.wrong("write the id of one kernel")
        is_for_all = os.geteuid() == 0 and not self.provisioner().runtime_dir
        others = places_of_others() if is_for_all else ()
        sandbox = find_sandbox(self.extra_args[0], look_at_all(self.runtime(), others))
        traffic = traffic_of(sandbox)
        print(json.dumps(as_json(sandbox, traffic), indent=1) if self.json_output
              else as_text(sandbox, traffic))  # fmt: skip


def find_sandbox(word: str, found: Iterable[Sandbox]) -> Sandbox:
    """The one kernel of *found* that *word* means; SpecError."""
    kernels = [one for one in found if one.record.kind in _OF_A_KERNEL]
    meant = [one for one in kernels if _is_meant(word, one)]
    if len(meant) > 1:  # other users may write the id of one of ours into their records
        meant = [one for one in meant if one.owner is None and _has_id(word, one)] or meant
    if len(meant) == 1:
        return meant[0]
    known = ", ".join(map(_named, meant or kernels)) or "none"
    raise SpecError(
        attempt=f"find the kernel {one_line(word)!r}",
        answer=f"it may be one of {len(meant)}" if meant else "no such kernel runs",
        remedy=f"Write one of these ids: {known}.",
    )


def _is_meant(word: str, sandbox: Sandbox) -> bool:
    notebook = sandbox.record.notebook
    return word in {notebook, os.path.basename(notebook)} - {""} or _has_id(word, sandbox)


def _has_id(word: str, sandbox: Sandbox) -> bool:
    ids = (sandbox.record.kernel_id, sandbox.record.sandbox_id)
    return bool(word) and any(one.startswith(word) for one in ids)


def _named(sandbox: Sandbox) -> str:
    whose = "" if sandbox.owner is None else f" (of uid {sandbox.owner})"
    return f"{short_id(sandbox.record)}{whose}"


def traffic_of(sandbox: Sandbox) -> Traffic:
    """What has gone over its network; SpecError if it has none that is counted."""
    if sandbox.traffic is None:
        raise SpecError(
            attempt=f"show the network of kernel {short_id(sandbox.record)}",
            answer="it has none",
            remedy=(
                "Give one to the next kernels of its kind:",
                f"{COMMAND}jupyter sandbox install --network gateway --network-allow packages",
            ),
        )
    return sandbox.traffic


def as_json(sandbox: Sandbox, traffic: Traffic) -> dict[str, Any]:
    """For programs."""
    told = asdict(traffic)
    del told["is_last"]
    return {
        "sandbox_id": sandbox.record.sandbox_id,
        "kernel_id": sandbox.record.kernel_id,
        "network": sandbox.record.network,
        **told,
        "network_allow": spoken_with(traffic),
        "network_refused": as_rules(only_refused(traffic.names)),
    }


def spoken_with(traffic: Traffic) -> list[str]:
    """As rules, whom the kernel has spoken with, or with network_audit looked up."""
    return as_rules(traffic.names.keys() - only_refused(traffic.names).keys())


def as_text(sandbox: Sandbox, traffic: Traffic) -> str:
    """For people."""
    lines = [f"Kernel {short_id(sandbox.record)}: {one_line(summary(traffic))}."]
    if traffic.names:
        shown = [*by_traffic(traffic.names).items()]
        lines += ["", table([_HEAD, *(_row(name, of_name) for name, of_name in shown)])]
        lines += ["", "What was let through, for its kernel.json or a configuration file:", ""]
        lines.append(as_option(spoken_with(traffic)))
    if asked := as_rules(only_refused(traffic.names)):
        lines += ["", "What was only refused: add what you know, a kernel can make up any.", ""]
        lines.append(", ".join(map(json.dumps, asked)))
    if traffic.unnamed:
        lines += ["", f"{traffic.unnamed} more times it wanted names that there is no room for."]
    return "\n".join(lines)


def _row(name: str, found: OfName) -> tuple[str, ...]:
    return (
        one_line(name),
        str(found.connections),
        format_bytes(found.down_bytes),
        format_bytes(found.up_bytes),
        str(found.refusals or ""),
    )
