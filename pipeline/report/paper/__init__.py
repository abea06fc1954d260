"""What the paper claims, and what runs say about each claim."""
