"""ends.py - any process outside; pure: how a kernel ended, as data that a program reads.

The sentence is for people. A program that runs notebooks finds the same, taken apart: in the
messages that tell it (`last_words.py`), in the notebook's outputs, at the provisioner
(``kernel_manager.provisioner.end``). What the fields mean stands in docs/ends.md; names are added,
and never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sandbox_provisioner.contract import Labels
from sandbox_provisioner.facilities.network.tell.counts import Traffic
from sandbox_provisioner.facilities.network.tell.said import most_used
from sandbox_provisioner.story import ExitStory

MIME = "application/vnd.sandbox-provisioner.end+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One kernel's end. *cell* is the ``msg_id`` of the request that it was answering, "" if none
    was known; *exit_code* and *signal* are None where nobody could learn them, or there is none."""

    kind: str
    sentence: str
    time: str
    kernel_id: str
    kernel_name: str
    cell: str
    exit_code: int | None
    signal: int | None
    memory_limit_bytes: int | None
    memory_peak_bytes: int | None
    cpu_seconds: float | None
    pids_limit_hits: int
    stopped_by: str = ""
    full_bytes: int | None
    path: str
    network: Mapping[str, Any] | None
    stderr_tail: str

    @classmethod
    def of(cls, story: ExitStory, labels: Labels, *, cell: str, seconds: float) -> End:
        """*seconds* is the time of the end, or of learning of it, since the epoch."""
        ended_itself = story.code is not None and story.code >= 0
        return cls(
            kind=str(story.kind),
            sentence=story.reason,
            time=datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds"),
            kernel_id=labels.kernel_id,
            kernel_name=labels.name,
            cell=cell,
            exit_code=story.code if ended_itself else None,
            signal=story.signal or None,
            memory_limit_bytes=story.memory_limit_bytes,
            memory_peak_bytes=story.memory_peak_bytes,
            cpu_seconds=story.cpu_seconds,
            pids_limit_hits=story.pids_limit_hits,
            stopped_by=story.stopped_by,
            full_bytes=story.full_bytes or None,
            path=story.lost_path or story.full_above,
            network=_network(story.network),
            stderr_tail=story.stderr_tail,
        )

    def as_json(self) -> dict[str, Any]:
        """What stands in messages, notebooks and files."""
        return asdict(self)


def _network(traffic: Traffic | None) -> dict[str, Any] | None:
    if traffic is None:
        return None
    told = asdict(replace(traffic, names=most_used(traffic)))
    del told["is_last"]
    return told


def ends_in(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The ends that stand in the outputs of a *notebook* (nbformat 4), each with the number of its
    cell, counted from 0, as ``cell_index``.

    What a cell shows is the kernel's word: it may have written such an output itself.
    """
    for index, cell in enumerate(notebook.get("cells", ())):
        for output in cell.get("outputs", ()):
            found = output.get("metadata", {}).get(MIME)
            if isinstance(found, Mapping):
                yield {**found, "cell_index": index}
