"""What every other package builds on, and nothing of models or layers."""
