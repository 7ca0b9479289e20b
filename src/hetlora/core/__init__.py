"""The federated algorithm: values, sums, the round. It needs torch and NumPy alone, and knows no model."""
