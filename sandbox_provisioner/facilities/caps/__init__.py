"""caps - a facility: memory, CPU, processes, disk traffic, and every limit that Linux has."""
