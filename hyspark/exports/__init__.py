"""Trained networks in the forms of other programs, each compared with the original before it is called done."""
