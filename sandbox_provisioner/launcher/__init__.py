"""launcher/ - what runs after `python -SI`: the launcher, PID 1 and the kernel until its program.

It stands on `inside/` and on the facilities' own `inside.py`, and imports nothing else of ours.
"""
