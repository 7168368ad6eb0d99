"""Launch `geta_hf.recipes.text_classification`: `accelerate launch recipes/text_classification.py CONFIG.yaml`."""

import sys
from pathlib import Path

# Imported rather than run as `__main__`, so that worker processes find the recipe's classes by their own module.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf.recipes.run import run_command
from geta_hf.recipes.text_classification import main

if __name__ == "__main__":
    run_command(main)
