"""CTs -> folders of 2D slices."""
