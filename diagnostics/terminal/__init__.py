"""What a person reads in the terminal, one file per kind of result. No numbers are made here."""
