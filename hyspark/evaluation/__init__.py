"""Scores of trained networks, and their predictions."""
