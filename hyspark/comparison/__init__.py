"""Whether pre-training pays: the same fine-tuning from several initial weights."""
