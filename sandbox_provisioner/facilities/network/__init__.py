"""network - a facility: its loopback, and what tells programs of it."""
