"""The HTML report, and the tables that it shares with the terminal. Everything is rendered from ``results/*.json``."""
