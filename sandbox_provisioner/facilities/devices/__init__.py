"""devices - nodes of the host that a box is given, and what of all others Linux lets it open."""
