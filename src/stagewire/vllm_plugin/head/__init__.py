"""Stage 0: EngineCore's executor and scheduler over the ring, and the API server, its answers and its end."""
