"""Turn element ids into families: sort them into groups, name their kind, and count what each one costs."""
