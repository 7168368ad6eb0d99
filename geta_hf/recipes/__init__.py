"""Recipes: one fine-tuning task each, from a YAML file to a compressed folder with its scores.

A recipe is a module with `main(argv)`, which reads `[CONFIG.yaml] [--key value ...]`; `recipes/` in the repository has
scripts that launch them. `CONFIGS` holds ready-made files.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""The folder of the ready-made YAML files; their names alone find them, such as `bert_squad`."""
