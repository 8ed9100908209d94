"""Architectures: one file a family, config -> Graph."""
