"""Rehearsal: a mark that is trained against simulated thieves."""
