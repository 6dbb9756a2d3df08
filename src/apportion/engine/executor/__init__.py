"""Executors, and the way from an engine's configuration to the one that a lane asks for."""
