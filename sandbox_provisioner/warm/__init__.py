"""warm - a kernel from a process that has its imports behind it, or one that waits for its start.

::

    in the launching process
      found.py     which nursery serves a request, which spare, and where they are
      obstacles.py pure: which starts a nursery, or a spare, cannot serve
      start.py     makes a nursery              spare.py   makes a spare
      launch.py    a start from a nursery       claim.py   a start that is bound to a spare
      process.py   what both of these start from: a PID 1 that is no child of ours
      launcher.py  what the server has of all these: a launcher that also prepares starts
      ahead.py     prepares the next start, in a thread
    inside a nursery's box
      nursery.py   imports, waits, forks
      preload.py   imports what a person wants there, and judges whether a kernel can have it
      kernel.py    a kernel, built as far as can be before the fork, and the rest after it
      pages.py     arranges memory so that children share it
      immortal.py  ends the counting of references, which would write to that memory
"""
