"""The torch runtime: straight-line code over torch operations."""
