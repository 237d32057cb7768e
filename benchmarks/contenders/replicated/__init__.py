"""Planning of stages that several machines hold."""
