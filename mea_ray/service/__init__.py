"""The victim behind Ray actors: replicas, their ledger, and the thief's client."""
