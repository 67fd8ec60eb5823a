"""warm - a kernel from a process that has its imports behind it.

::

    plans.py     pure: the nursery's own plan, and a kernel's plan in two parts
    nursery.py   inside the nursery's box: imports, waits, forks, becomes a kernel
    found.py     any process outside: which nursery serves a request, and where it is
    start.py     makes a nursery
    launch.py    in the launching process: a start from a nursery
"""
