"""Run `recipes/question_answering.py`, whose former name this is; it goes with the next version."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("question_answering.py")), run_name="__main__")
