"""Whether the quantized model, and the graph made from it, still do what the floating-point model does."""
