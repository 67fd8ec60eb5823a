"""facilities/ - one folder for each thing that a sandbox has or is held by.

In each folder a file's name is the law of its process and privilege::

    facts.py     who launches: looks at the host for the one who asks; reads only
    plan.py      pure: from a wish and facts to steps, each with its reason
    outside.py   who launches, with its rights: makes and removes on the host
    inside.py    the launcher, PID 1 and the kernel: performs the steps; imports `inside/` only
    tell.py      pure: what people read of it: causes, remedies, words

A folder has the files that it needs, and what a file would be too long for is a package of that
name. No facility imports another one: what two of them need lies further down, and in which order
their steps come stands in `orders/` alone.
"""
