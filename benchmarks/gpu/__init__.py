"""Everything that only a GPU can show, in parts of at most 8 minutes: see README.md in this folder."""
