"""Formats that the project's tests cannot write for lack of the packages: offered as the others are, but not proved."""
