"""policy - in who launches: what an administrator lets people have, by a file of root's.

::

    person.py      who it is for whom something is started
    read.py        the file: whose it is, what is wrong with it, and on which line (lines.py)
    meaning.py     what a value in it comes to: by options.py, and nothing else
    hub.py         what a hub that is not root may have
    policy.py      all of it; which section counts for whom
    terms.py       what that comes to for one person
    narrow.py      what becomes of a wish (SandboxSpec) under these terms
    admission.py   whether there is room for one more
    current.py     the policy as it is now

Where a server of root's, a spawner or a broker asks, nobody gets around it. A user's own server
asks too: there it is advice, since whose process it is can change it. docs/policy.md.
"""
