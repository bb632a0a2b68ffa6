"""Serving: one model, one endpoint, experts chosen for each token."""
