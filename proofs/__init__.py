"""Slow proofs that real processes do what the tests of single parts promise; each has a small form in the test suite."""
