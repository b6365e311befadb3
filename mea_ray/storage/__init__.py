"""Files that are written whole, leases, and storages that every node can reach."""
