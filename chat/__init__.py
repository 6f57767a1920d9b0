"""Talking to a GGUF on a laptop: no PyTorch, no network."""
