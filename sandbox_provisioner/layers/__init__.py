"""layers/ - whoever launches, and the commands: what kernels write that outlives them.

::

    place.py     the directory for it, on a file system that can be an upper one
    folders.py   one folder for each kernel whose work directory is reviewed
    changes.py   reads only: what of the work directory a kernel has changed
    guard.py     pure: what of that may be kept
    keep.py      writes it into the work directory
    review.py    a folder and its work directory, for whoever decides
    kept.py      what kernels install: one folder for each kernel, or for each user and root

A kernel has written what is read here, and may have meant it for whoever reads: nothing is followed
out of a directory, nothing is run, and nothing is read without a bound.
"""
