"""Which tokens run in which step, in which blocks: ints only."""
