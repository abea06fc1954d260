"""Doors for other programs: SAELens, SAEBench, and whatever reads activations as a data set of torch."""
