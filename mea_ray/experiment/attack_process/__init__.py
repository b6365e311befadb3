"""Runs the attack in a separate process that has only the thief's data and a query interface."""
