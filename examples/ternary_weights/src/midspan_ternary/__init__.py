"""An example: models whose weights are -1, 0 and 1."""
