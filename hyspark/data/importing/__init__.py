"""Scans of any format -> a data set in nnU-Net layout."""
