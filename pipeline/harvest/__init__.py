"""Stage one: text through a language model, and its activations into a store."""
