"""Class probabilities and their scores."""
