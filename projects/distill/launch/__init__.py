"""Training command, in one process or several, and the end of each process."""
