"""One module for each command; a module imports nothing heavy before its command runs."""
