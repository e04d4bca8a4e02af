"""Data sets: nnU-Net folders, data lists, splits, subsets."""
