"""broker/ - kernels for ordinary users' servers, as boxes with ids and groups of root's.

::

    frames.py    pure: bytes ↔ messages, bounded
    values.py    pure: our frozen values ↔ what JSON has
    wishes.py    pure: what a message asks for, judged as a stranger's
    peer.py      the daemon: who is at the other end, and what comes from there
    eyes.py      the daemon: looks at the host with a user's rights
    kernels.py   the daemon: starts kernels, and has them
    daemon.py    the daemon: listens, bounds, answers
    talk.py      a server: one question and its answer
    launcher.py  a server: a `contract.Launcher` that asks

docs/broker.md is for administrators, docs/broker-protocol.md tells what is said.
"""
