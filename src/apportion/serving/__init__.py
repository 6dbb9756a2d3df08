"""The server. Two processes: one that speaks HTTP and imports neither torch nor transformers, one that owns the engine."""
