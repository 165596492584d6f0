"""Stage 0: EngineCore's executor and scheduler over the ring, its API server, and what that says and how it ends."""
