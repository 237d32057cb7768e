"""What-if planning: hardware that is not here, and pools that do not exist yet."""
