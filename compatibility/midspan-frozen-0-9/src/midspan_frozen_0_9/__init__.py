"""Two devices built against device interface 0.9, kept as they were."""
