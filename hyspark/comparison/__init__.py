"""Does pre-training pay? The same fine-tuning from several starts."""
