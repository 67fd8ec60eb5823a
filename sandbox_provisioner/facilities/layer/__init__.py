"""layer - what kernels install, kept when they have ended."""
