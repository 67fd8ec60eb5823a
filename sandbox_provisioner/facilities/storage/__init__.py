"""storage - a facility: how much a kernel may write, and on what file system."""
