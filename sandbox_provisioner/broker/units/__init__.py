"""units/ - the units of systemd for the broker; `jupyter sandbox broker --install` writes them."""
