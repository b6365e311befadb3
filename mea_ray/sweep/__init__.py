"""Many trials at once: the space and its cost, the trial on Ray Tune, shared victims and services, resume."""
