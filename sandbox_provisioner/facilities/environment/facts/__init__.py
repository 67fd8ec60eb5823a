"""facts - who launches, reads only: what a kernel's program needs of the host."""
