"""rights - a facility: what the kernel may ask Linux for."""
