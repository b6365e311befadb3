"""Measurements of speed, each with what it is compared to in the same run."""
