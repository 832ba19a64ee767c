"""Quantization as pure math on tensors: knows no model and no file, imports torch and the project's errors only."""
