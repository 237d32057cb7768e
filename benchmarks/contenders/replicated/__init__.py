"""Planning of stages that several machines hold; no FusionAI runtime executes such stages."""
