"""sockets - a facility: where the kernel and its clients meet."""
