"""images/ - whoever makes images, and whoever launches: root file systems of kernels, by name.

An image is a squashfs file that never changes; its name in the store is its SHA-256.
"""
