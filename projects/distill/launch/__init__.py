"""The training command, in one process or several."""
