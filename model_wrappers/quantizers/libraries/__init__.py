"""Layers of other libraries, put in one by one where our own component selection says: bitsandbytes and torchao."""
