"""The command line: flags -> settings -> one call."""
