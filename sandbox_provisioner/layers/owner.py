"""layers/owner.py - any process outside: makes files as somebody's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from sandbox_provisioner.inside import kernel_calls as kernel


@contextlib.contextmanager
def as_owner(uid: int, gid: int) -> Iterator[None]:
    """With that one's rights to files in this thread, and no more: what is made is *uid*'s. Who is
    not root has no other's."""
    if os.geteuid() != 0:
        yield
        return
    kernel.set_filesystem_ids(uid, gid)
    try:
        yield
    finally:
        kernel.set_filesystem_ids(0, os.getegid())
