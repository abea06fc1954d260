"""Scores of trained autoencoders on contexts that no run was trained on, and probing."""
