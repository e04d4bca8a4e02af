"""The training loop and all that a run needs around it."""
