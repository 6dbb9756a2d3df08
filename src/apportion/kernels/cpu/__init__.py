"""The CPU kernels of csrc/cpu, bound. Knows the compiled module and why it may be absent; must not know models or engine."""
