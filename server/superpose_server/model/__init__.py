"""The base model on one device: spans of tokens in, logits out."""
