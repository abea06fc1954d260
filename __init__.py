"""posae: sparse autoencoders that know the position of each token."""

__version__ = "0.1.0"
