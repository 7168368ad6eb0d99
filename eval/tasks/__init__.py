"""lm-eval's tasks over local files."""
