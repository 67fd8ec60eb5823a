"""broker/box.py - pure: what a server that a hub has put into a box finds there of its hub.

::

    /jupyterhub/            a folder of root's, on the host beside the record of the box
      api.sock              the way to the hub's API
      broker.sock           for kernels: whoever connects is this box's person
      kernels/<sandbox id>/sockets/   those of its kernels, which run in boxes beside this one
"""

from __future__ import annotations

INSIDE = "/jupyterhub"
SOCKET = f"{INSIDE}/broker.sock"
KERNELS = f"{INSIDE}/kernels"
