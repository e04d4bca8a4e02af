"""Weights: read, load with a report, export."""
