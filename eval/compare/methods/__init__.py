"""One file for each method; each lists what it offers as `METHODS`."""
