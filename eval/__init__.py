"""Repeat the studies and runs that docs/results.md reports, with local files only."""
