"""Label maps and their scores."""
