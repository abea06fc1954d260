"""A report as one HTML file: figures, tables, and the explorer of features."""
