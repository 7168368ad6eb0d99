"""Compare with other methods of compression at equal bytes: their rules on the machinery of this project."""
