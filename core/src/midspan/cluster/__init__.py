"""Executors and replicas."""
