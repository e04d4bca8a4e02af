"""Exit codes of the command line."""

DONE = 0
FOUND = 1
"""Done with findings: faults in a data set, cases without a prediction, a training that diverged."""
WRONG_USE = 2
"""Flags, files or data do not fit."""
STOPPED = 75
"""A run was asked to stop, and the same command continues it: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Control-C: 128 + SIGINT."""
