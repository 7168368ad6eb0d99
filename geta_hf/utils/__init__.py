"""Offer every room small tools that know nothing of pruning or quantization: files, modules, tables, shards.

A function belongs here if it would make sense in a package about something else; each is imported from its module.
"""
