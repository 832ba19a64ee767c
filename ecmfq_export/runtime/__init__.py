"""Running a model: prompt and images in, text out, over any runner."""
