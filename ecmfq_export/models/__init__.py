"""What a model family looks like: its spec, its tensors on disk, and its PyTorch reference."""
