"""How well trained networks do."""
