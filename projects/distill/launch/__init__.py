"""The training command: one process or several, and how each one ends."""
