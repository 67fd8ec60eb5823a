"""policy - in who launches: what an administrator lets people have, from a file of root's.

::

    person.py    who it is for whom something is started
"""
