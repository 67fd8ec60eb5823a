"""broker/ - kernels for ordinary users' servers, as boxes with ids and groups of root's.

::

    frames.py    pure: bytes ↔ messages, bounded
    values.py    pure: our frozen values ↔ what JSON has
    wishes.py    pure: what a message asks for, judged as a stranger's
    server_wish.py  pure: the server that a hub wishes for a person
    peer.py      the daemon: who is at the other end, and what comes from there
    eyes.py      the daemon: looks at the host with a user's rights
    desk.py      the daemon, a hub: for whom one asks there, and what that one may have
    sockets.py   the daemon, a hub: gives a kernel's sockets to who asked for it
    kernels.py   the daemon: starts kernels, and has them
    daemon.py    the daemon: listens, bounds, answers
    talk.py      a server: one question and its answer
    launcher.py  a server: a `contract.Launcher` that asks
    box.py       a server in a box of a hub's: what it finds of its hub there

docs/broker.md is for administrators, docs/broker-protocol.md tells what is said.
"""
