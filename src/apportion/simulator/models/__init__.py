"""Builders: known networks at the level of operators and shapes."""
