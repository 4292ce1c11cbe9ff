"""Prints results in the terminal, one file per kind of result. It computes no numbers."""
