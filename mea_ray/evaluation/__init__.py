"""Metrics and probes of trained models."""
