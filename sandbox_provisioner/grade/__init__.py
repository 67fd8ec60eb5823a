"""grade/ - whoever grades, with their rights: other people's notebooks, run in boxes and marked.

::

    terms.py          pure: what a submission may use, and what surrounds every one alike
    verdict.py        pure: in words, why a submission was not run to its end
    shown.py          pure: what is kept of what a cell shows
    kernels.py        a kernel for one submission: its box, and a client that reads so much
    run.py            a notebook's cells, one after the other
    reading.py        a notebook that somebody else has written
    imports.py        pure: what an assignment imports
    copies.py         the files of a submission: a copy without links; what tells it from others
    preprocessor.py   the same for nbgrader's own command          nbgrader
    course.py         nbgrader's course and gradebook              nbgrader
    book.py           what has been graded already
    order.py          pure: how an assignment is to be graded
    assignment.py     all submissions, so many at a time

What a submission's kernel says is bounded in size and taken for data. The tests run in that kernel,
as nbgrader has it: what a submission can forge by that stands in docs/nbgrader.md.
"""
