"""Describe an exported folder: tables, the picture, HTML pages, the model card; upload it to the Hub."""
