"""Classification: class probabilities of images, and their scores."""
