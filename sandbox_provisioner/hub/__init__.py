"""hub - the Jupyter server of a hub's user, and the hub itself: what administrators configure.

::

    kernelspecs.py   in a user's server: which kernels there are, each of them in a sandbox
    terminals.py     there: terminals that open in a sandbox
    spawner.py       in the hub: starts each user's whole server in a box of its own
    kernels.py       in such a box: starts kernels that end before their server does
    doors.py         in the hub: the folder with the ways into and out of such a box
    relay.py         in the box, and in the hub: carries bytes over its wall
    ranges.py        whoever starts boxes for people: which ids are whose, for ever
    tell.py          pure: the rows of `jupyter sandbox doctor --hub`
"""
