"""facilities/ - one folder for each thing that a sandbox has or is held by.

In each folder a file's name is the law of its process and privilege::

    wish/        pure: what may be asked for, with its options
    facts.py     who launches: looks at the host for the one who asks; reads only
    plan.py      pure: from a wish and facts to steps, each with its reason
    inside.py    the launcher, PID 1 and the kernel: performs the steps; imports `inside/` only
    tell.py      pure: what people read of it: causes, remedies, words

A folder has the files that it needs, and what a file would be too long for is a package of that
name. One has a room more: `caps/cgroup/`, which makes and removes groups on the host, with the
rights of who launches. No facility imports another one: what two of them need lies further down,
and in which order their steps come stands in `orders/` alone.
"""
