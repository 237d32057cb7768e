"""What all roles of a pool share: the messages they exchange, sessions with the broker, parcels, membership."""
