"""A worker stage: the loop that runs what the head decides."""
