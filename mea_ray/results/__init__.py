"""The schema of a result."""
