"""warm - in the launching process: a kernel from what was prepared for its start.

::

    keys.py          what a nursery, or a spare, has to be made of to serve a request
    found.py         those that are there: two sources of a `Performer`
    why_cold.py      pure: which starts a nursery, or a spare, cannot serve
    start_from.py    a start from a spare or a nursery
    make_nursery.py  makes a nursery          make_spare.py   makes a spare
    launcher.py      what the server has of all these: a launcher that also prepares starts
    ahead.py         prepares the next start, in a thread

What runs in a nursery's box is in `nursery/`.
"""
