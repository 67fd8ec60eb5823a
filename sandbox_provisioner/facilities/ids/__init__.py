"""ids - a facility: who the kernel is, inside and outside."""
