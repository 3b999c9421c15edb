"""Training checkpoints that are stock checkpoints of the student."""
