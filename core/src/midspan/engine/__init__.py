"""The step loop, its process, and the ways in."""
