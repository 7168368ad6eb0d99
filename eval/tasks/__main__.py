"""Write lm-eval's tasks over local files: `python -m eval.tasks DATA_DIR OUT_DIR [--tasks NAMES]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from geta_hf import GETAError
from geta_hf.evaluation import write_tasks


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tasks' YAML files, and print the command that runs them."""
    parser = argparse.ArgumentParser("python -m eval.tasks", description="lm-eval's tasks over local files")
    parser.add_argument("data_dir", help="holds <task>/<split>.jsonl.gz and blimp/<paradigm>.jsonl.gz")
    parser.add_argument("out_dir", help="where to write one YAML file for every task")
    parser.add_argument("--tasks", help="names separated by commas; default: all that have files")
    arguments = parser.parse_args(argv)
    try:
        names = write_tasks(arguments.data_dir, arguments.out_dir, arguments.tasks)
    except (GETAError, OSError) as error:
        parser.exit(2, f"{error}\n")
    print(
        f"lm_eval run --model hf --include_path {arguments.out_dir} --tasks {','.join(names)} --model_args pretrained="
    )


if __name__ == "__main__":
    main()
