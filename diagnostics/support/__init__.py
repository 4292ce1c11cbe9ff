"""Helpers that every other package builds on; they know nothing of models or layers."""
