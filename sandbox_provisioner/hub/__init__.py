"""hub - the Jupyter server of a hub's user, and the hub itself: what administrators configure.

::

    kernelspecs.py   in a user's server: which kernels there are, each of them in a sandbox
    terminals.py     there: terminals that open in a sandbox
    spawner.py       in the hub: starts each user's whole server in a box of its own
    through_broker.py  in a hub that is not root: has the broker start it
    for_hub.py       in the broker's daemon: has it, for that hub
    persons.py       there: for whom, and with whose rights
    servers.py       in a hub that is root, or in the daemon: starts it
    kernels.py       there: starts the kernels of such a server, as boxes beside it
    doors.py         there: the folders with the ways into and out of such a box
    relay.py         in the box, and in the hub: carries bytes over its wall
    ranges.py        whoever starts boxes for people: which ids are whose, for ever
    tell.py          pure: the rows of `jupyter sandbox doctor --hub`
"""
