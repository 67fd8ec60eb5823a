"""hub/kernels.py - in a hub user's Jupyter server, in the box of our spawner: starts its kernels.

They are plain children of the server, and share the person's memory with it. Where that is full
Linux ends whoever has the highest score: a kernel and what it has started, and never the server,
however much that has (proc(5), oom_score_adj).
"""

from __future__ import annotations

from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

# Anybody may raise it, for himself and his children.
_FIRST_TO_END = ("/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj; exec "$0" "$@"')
NAME = "sandbox-child"


class ChildProvisioner(LocalProvisioner):
    """jupyter_client's own, whose kernels end before their server does."""

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called before every start and restart: the command."""
        found: dict[str, Any] = await super().pre_launch(**kwargs)
        return found | {"cmd": [*_FIRST_TO_END, *found["cmd"]]}
