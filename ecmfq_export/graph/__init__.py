"""From a checkpoint to ONNX: an emitted decoder, a traced vision tower, and the passes that quantize them."""
