"""What one sees: the one-file report and the notebook widgets, both drawn by the same built modules in `static/`."""
