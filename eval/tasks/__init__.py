"""Write lm-eval's tasks over local files: `python -m eval.tasks`."""
