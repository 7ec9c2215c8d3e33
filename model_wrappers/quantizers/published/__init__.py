"""Checkpoints that others quantized and published, read exactly into the packed format, without their libraries.

AutoAWQ's GEMM, GPTQ v1 and v2, the integer formats of compressed-tensors, and GRACE's. ``formats.read_config`` says
what a checkpoint claims to be, ``loading.load_published`` loads it, and ``grid`` recognises a plain checkpoint whose
weights lie on a low-bit grid.
"""
