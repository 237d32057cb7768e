"""Serving without running it: requests through a placement, token by token, and published clusters to try it on."""
