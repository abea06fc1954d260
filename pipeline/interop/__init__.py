"""Interfaces for other programs: SAELens, SAEBench, and trainers that read a PyTorch data set."""
