"""Somebody else's model as a suspect: read from a file, a URL or a function, asked in a process of its own."""
