"""Other systems' placements for serving, published clusters, and a simulator of requests through a placement."""
