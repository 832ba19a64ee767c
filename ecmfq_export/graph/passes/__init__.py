"""Graph rewrites, one a file; each is an onnx-ir pass that changes the model in place and says whether it did."""
