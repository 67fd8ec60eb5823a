"""namespaces - a facility: what of the machine is the sandbox's own."""
