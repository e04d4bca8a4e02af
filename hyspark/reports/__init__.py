"""HTML pages of runs and data checks."""
