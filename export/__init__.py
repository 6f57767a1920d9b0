"""From base weights and a LoRA adapter to verified GGUF files."""
