"""The paper's claims, and what runs say about each."""
