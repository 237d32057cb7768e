"""Published figures of hardware, what share of them work reaches, and pools described by a file."""
