"""hub - the Jupyter server of a hub's user, and the hub itself: what administrators configure.

::

    kernelspecs.py   in a user's server: which kernels there are, each of them in a sandbox
    terminals.py     there: terminals that open in a sandbox
"""
