"""Passes: pure functions Graph -> Graph, one file each."""
