"""Libraries that turn a graph and a table of kernels into a program."""
