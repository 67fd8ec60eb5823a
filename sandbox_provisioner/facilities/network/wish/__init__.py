"""wish - any process outside; pure: which network a sandbox has, with whom, and how much of it.

Nothing is imported here, so that a gateway takes `rules.py` alone, without the options.
"""
