"""Stages: quantization methods run over a model, one decoder layer at a time, from directory to directory."""
