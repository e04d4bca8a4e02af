"""Data path: "files on disk -> crops `(b, 1, h, w, d)` in [0, 1]". Knows nothing of networks or training."""
