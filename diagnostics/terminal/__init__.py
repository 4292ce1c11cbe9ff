"""What a person reads in the terminal, one file per kind of result. It computes no numbers."""
