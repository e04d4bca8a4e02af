"""From files to prepared volumes in a store."""
