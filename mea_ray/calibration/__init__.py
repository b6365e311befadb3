"""Thresholds of a proof from many innocent and watermarked models."""
