"""landlock - a facility: the confinement for places that have no namespaces."""
