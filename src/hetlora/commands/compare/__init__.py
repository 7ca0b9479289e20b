"""`hetlora compare`: methods over seeds and learning rates, and one table of the results."""
