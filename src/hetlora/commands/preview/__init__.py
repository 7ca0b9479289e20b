"""`hetlora data`: who holds what, before anything is trained."""
