"""The numpy runtime: the definition of every operation, and a device."""
