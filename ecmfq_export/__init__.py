"""ecmfq_export: a compiler from Mixture-of-Experts vision-language checkpoints to W4A8 ONNX and TensorRT."""

__version__ = "0.1.0"
