"""Midspan: language models on any hardware."""

__version__ = "0.1.0"
