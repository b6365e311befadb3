"""The HTML report and what it shares with the terminal. Everything is rendered from ``results/*.json``."""
