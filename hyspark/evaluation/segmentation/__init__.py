"""Segmentation: label maps of volumes, and their scores."""
