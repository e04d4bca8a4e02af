"""Masks, and networks under a mask."""
