"""The parts of `analyses/select_cutoffs.py`: its config, its runs and its tables."""
