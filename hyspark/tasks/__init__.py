"""What a step and a validation are, for each kind of training."""
