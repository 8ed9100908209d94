"""Midspan on the host's processor: a plugin, with no privilege over any other."""
