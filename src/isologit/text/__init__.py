"""From text to token ids and back: tokenizers, incremental decoding, chat templates. Knows no tensors."""
