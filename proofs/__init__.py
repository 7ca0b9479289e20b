"""Slow proofs with real processes. Each has a small form in the test suite."""
