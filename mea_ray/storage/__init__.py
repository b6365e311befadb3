"""Atomically written files, leases, and storages that every node can reach."""
