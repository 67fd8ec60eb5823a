"""warm - a kernel from a process that has its imports behind it, or one that waits for its start.

::

    in the launching process
      keys.py          what a nursery, or a spare, has to be made of to serve a request
      found.py         those that are there: two sources of a `Performer`
      obstacles.py     pure: which starts a nursery, or a spare, cannot serve
      start_from.py    a start from a spare or a nursery
      make_nursery.py  makes a nursery          make_spare.py   makes a spare
      launcher.py      what the server has of all these: a launcher that also prepares starts
      ahead.py         prepares the next start, in a thread
    inside a nursery's box
      nursery.py   imports, waits, forks
      preload.py   imports what a person wants there, and judges whether a kernel can have it
      kernel.py    a kernel, built as far as can be before the fork, and the rest after it
      pages.py     arranges memory so that children share it
      immortal.py  ends the counting of references, which would write to that memory
"""
