"""contents/ - the Jupyter server: a contents manager that no planted link leads astray.

Loaded only by a server whose configuration names it (`jupyter sandbox install --server`), since it
stands on jupyter_server, which a kernel does not need.

A front end saves, copies and deletes with the server's rights, at paths whose entries code in a
kernel may exchange at any moment. Of a name only descriptors come (`beneath.py`), and what is
written, read, moved or removed is what they hold.
"""

from sandbox_provisioner.contents.manager import SandboxContentsManager

__all__ = ["SandboxContentsManager"]
