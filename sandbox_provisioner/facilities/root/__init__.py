"""root - a facility: the root file system."""
