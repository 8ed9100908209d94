"""Checkpoints: finding a model, reading its weights."""
