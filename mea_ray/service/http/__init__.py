"""A victim behind HTTP: keys, limits, charges and answers on Ray Serve, with the replicas and the ledger of sweeps."""
