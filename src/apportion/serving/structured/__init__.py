"""Text that must have a shape: JSON schemas, expressions and grammars become masks over the vocabulary, by llguidance.

A grammar comes from a stranger. It is compiled and tried in a process of its own with a limit on time and memory (sandbox), and only what
came through there is compiled here (compiler) and followed token by token (matcher), off the engine's thread.
"""
