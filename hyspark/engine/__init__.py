"""Training: "config -> trained weights"."""
