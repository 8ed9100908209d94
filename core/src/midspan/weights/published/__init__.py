"""Readers of published quantized checkpoints, one file a format."""
