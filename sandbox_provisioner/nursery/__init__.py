"""nursery/ - in a nursery's box, in the kernel's own interpreter; nobody's rights.

::

    main.py      imports, waits, forks
    preload.py   imports what a person wants there, and judges whether a kernel can have it
    kernel.py    a kernel, built as far as can be before the fork, and the rest after it
    pages.py     arranges memory so that children share it
    immortal.py  ends the counting of references, which would write to that memory

Every kernel inherits all that is loaded here, so that only what a kernel would import is. Who makes
nurseries, finds them and starts from them is in `warm/`.
"""
