"""Compare with other methods of compression at equal bytes: each one's score or rounding on this project's machinery."""
