"""process - a facility: from the first step to the kernel's program, and how its end is told."""
