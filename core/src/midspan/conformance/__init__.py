"""The suite that holds a device against the reference."""
