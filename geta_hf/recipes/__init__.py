"""Recipes: one fine-tuning task each, from a YAML file to a compressed folder with its scores.

A recipe is a module with `main(argv)`, which reads `[CONFIG.yaml] [--key value ...]`; `recipes/` in the repository has
scripts that launch them. `CONFIGS` holds ready-made files.
"""

from pathlib import Path

RECIPES = {
    "question_answering": "extractive question answering, on SQuAD or data like it: EM and F1",
    "text_classification": "one of several classes, or a number, for texts or pairs: GLUE or other data",
    "summarization": "encoder-decoders that write summaries: ROUGE",
    "image_classification": "image classification, on the Hub, folders of classes or idx files: accuracy",
    "language_modeling": "causal language models on texts, instructions or conversations: perplexity",
}
"""Recipe -> its task. The name is that of the module, and what `recipe:` in a config names."""

CONFIGS = Path(__file__).parent / "configs"
"""The folder of the ready-made YAML files; their names alone find them, such as `bert_squad`."""
