"""Files -> prepared volumes in a store."""
