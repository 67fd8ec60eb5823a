"""inside/ - runs in the launcher: one thread, after the server's spawn, before the kernel's exec.

Imports `os`, `sys`, `ctypes` and built-in modules, and nothing of ours outside this folder, so that
a start pays for no import it does not need.
"""
