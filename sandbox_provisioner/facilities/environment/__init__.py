"""environment - a facility: the kernel's program, what it needs, and its variables."""
