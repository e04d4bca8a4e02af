"""Prepared volumes and images -> batches."""
