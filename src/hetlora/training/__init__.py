"""What one machine does: local steps, the in-process engine, evaluation, the cost of both."""
