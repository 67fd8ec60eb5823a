"""workdir - a facility: the work directory, and what of it is kept from the kernel."""
