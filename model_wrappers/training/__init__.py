"""Training: quantization-aware (GRACE) and adapters, resumable and exported into the packed format."""
