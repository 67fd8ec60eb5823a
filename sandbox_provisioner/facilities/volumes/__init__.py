"""volumes - a facility: more paths of the host."""
