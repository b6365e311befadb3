"""Someone else's model as a suspect: a file in its own process, a URL, or a function."""
