"""Give every element of every dimension an id, and let each operator say which ids belong together."""
