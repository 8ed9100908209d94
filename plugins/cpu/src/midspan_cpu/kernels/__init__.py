"""The device's kernels, one module for each family; ``table`` puts them together."""
