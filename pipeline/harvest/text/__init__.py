"""Text: which documents, and how they become contexts of token ids."""
