"""A run: its configuration, folder, checkpoints, metrics and report."""
