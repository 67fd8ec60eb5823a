"""Groups that a test has made, and their end."""

from __future__ import annotations

import time

from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts, CgroupTree, open_existing


async def removed(tree: CgroupTree, seconds: float = 5.0) -> None:
    """Remove *tree*, and wait for its processes so long."""
    for left in tree.removing(seconds):
        await tree.pause(left)


def ended(facts: CgroupFacts, name: str, seconds: float = 5.0) -> None:
    """End what is left in the tree called *name*, and remove it; in *seconds* at most."""
    tree = open_existing(facts, name)
    tree.kill()
    for _ in tree.removing(seconds):
        time.sleep(0.01)
