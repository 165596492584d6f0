"""A checkpoint on disk, read without torch: the model's depth, its tensors, and which stage owns which of them.

Only smollm.py uses torch: it makes a small checkpoint for demonstrations.
"""
