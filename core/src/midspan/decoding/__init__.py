"""What callers ask of generation, and how it becomes sampling numbers."""
