"""Shared foundations: errors, types, tables of components, seeds, versions."""
