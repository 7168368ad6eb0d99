"""Run `recipes/question_answering.py` under its former name, which the next version drops."""

import sys
from pathlib import Path

# Imported rather than run as `__main__`, so that worker processes find the recipe's classes by their own module.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from geta_hf.recipes.question_answering import main
from geta_hf.recipes.run import run_command

if __name__ == "__main__":
    run_command(main)
