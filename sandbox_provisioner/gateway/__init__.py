"""gateway/ - the network gateway: one unprivileged process that judges, dials and moves bytes for
all boxes of a server."""
