"""Sparse autoencoders: one file an architecture, and how they are saved.

``registry.new_autoencoder`` makes one by name, ``saving.load_autoencoder`` opens a saved one;
``autoencoder`` says what all of them share. Importing this folder imports none of them, nor torch.
"""
