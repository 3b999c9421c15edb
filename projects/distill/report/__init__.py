"""The report of a run, and of several: one HTML page from the files in their OUTPUT_DIR."""
