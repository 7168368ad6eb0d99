"""Serve every room with small tools that know nothing of pruning or quantization: files, modules, tables, shards."""
