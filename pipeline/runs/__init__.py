"""A run: the folder of one trained autoencoder, and what is in it."""

from .run import EVALUATION, WEIGHTS, Run, digest_of, runs_below

__all__ = ["EVALUATION", "WEIGHTS", "Run", "digest_of", "runs_below"]
