"""What a run has learned, taken away: written for others to load, and asked."""
