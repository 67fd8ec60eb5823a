"""facilities/volumes/plan.py - pure: more paths of the host, each opened and judged before."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.plan import Site, Start, Step, mapping_words, unmapped_steps
from sandbox_provisioner.spec import relative


def check(site: Site) -> None:
    """A mount point can be made in the box's own /etc, not in what shows there of the host's."""
    for facts in site.volumes:
        target = facts.volume.target
        for path in site.facts.machine.system_files:
            if relative(target, path) and not os.path.exists(target):
                raise SpecError(
                    attempt=f"show the volume {facts.volume.source} at {target}",
                    answer=f"{path} is the system's own, where it cannot be made",
                    remedy=f"Show a directory in place of all of {path}, or make {target} outside.",
                )


def take(start: Start) -> Iterator[Step]:
    """Their mounts, read-only unless they were asked for otherwise."""
    for number, facts in enumerate(start.site.volumes):
        volume = facts.volume
        asked = {"readonly": volume.readonly, "noexec": volume.noexec}
        how = (word for word, is_so in asked.items() if is_so)
        mapped = mapping_words(f"volume-{number}", facts, start.site)
        words = (volume.target, *mapped, *how, "nosuid", "nodev")
        yield Step("take-place", words, "asked for by volumes")


def attach(start: Start) -> Iterator[Step]:
    """In a root that has everything else."""
    for facts in start.site.volumes:
        yield Step("attach", (facts.volume.target,))


def freeze_unmapped(start: Start) -> Iterator[Step]:
    """See `plan.unmapped_steps`."""
    for facts in start.site.volumes:
        yield from unmapped_steps(facts.volume.target, facts)
