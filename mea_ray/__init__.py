"""Steal watermarked models through their query API, on Ray, and see whether the owner can still prove it."""

__version__ = "0.1.0"
