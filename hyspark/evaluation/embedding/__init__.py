"""One vector per volume or region from an encoder, and what a linear head or neighbours find in them."""
