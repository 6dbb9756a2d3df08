"""Quality of a model, measured through the engine: every number with its interval. `apportion eval` is the same from a shell."""
