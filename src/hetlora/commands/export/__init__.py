"""Export of a trained run."""
