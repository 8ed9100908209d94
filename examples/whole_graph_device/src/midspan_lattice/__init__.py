"""A device that takes a whole graph at once, with an array library of its own."""
