"""A checkpoint on disk, read without torch: the model's depth, its tensors, and which stage owns which of them."""
