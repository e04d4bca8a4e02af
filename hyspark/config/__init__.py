"""Settings of all runs: frozen dataclasses whose fields are YAML keys and flags."""
