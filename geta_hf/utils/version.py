"""Define the version of the package, which several rooms write into files."""

__version__ = "0.1.0.dev0"
