"""Which cases there are: nnU-Net folders, data lists, splits, subsets."""
