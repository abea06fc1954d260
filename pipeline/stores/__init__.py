"""Stores made of stores: pieces put together, whole ones copied or published."""
