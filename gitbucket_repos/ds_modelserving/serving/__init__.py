"""Serve one release over HTTP: micro-batches, a journal of every answer, swaps without a pause."""
