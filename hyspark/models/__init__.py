"""Networks: "(b, 1, h, w, d) crops -> loss, or class scores". Knows nothing of files, data sets or training."""
