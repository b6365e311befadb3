"""Someone else's model as a suspect: read from a file, a URL or a function, and queried in its own process."""
