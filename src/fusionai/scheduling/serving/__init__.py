"""Placement for serving: which machine holds which layers while tokens are generated."""
