"""The one training engine, its objectives and its checkpoints."""
