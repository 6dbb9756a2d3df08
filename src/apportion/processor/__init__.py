"""Text in, text out: tokenizer, incremental detokenizer, chat template. Knows nothing of models, batches or engines."""
