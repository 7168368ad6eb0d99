"""Reproduce the tables of the paper's evaluation at its own settings: one command a table, one JSON line a cell."""
