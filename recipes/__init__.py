"""Scripts that launch the recipes of `geta_hf.recipes` from a clone, and the demo."""
