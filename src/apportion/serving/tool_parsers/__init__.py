"""Tool calls in generated text: how each family of models writes them, read as text comes and asked for by a grammar."""
