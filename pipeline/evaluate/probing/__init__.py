"""Sparse probing: what single features of a dictionary, or single activations, tell of a token or a text.

``protocol`` is SAEBench's way of choosing rows, features and probes; ``offline`` applies it to tasks made
from a store alone, ``hub`` to SAEBench's own datasets. Importing this folder imports none of them, nor
torch, nor scikit-learn.
"""
