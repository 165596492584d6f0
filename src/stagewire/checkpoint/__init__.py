"""Reads a checkpoint on disk without torch: the model's depth, its tensors, and which stage owns which of them.

Only smollm.py uses torch, to make a small checkpoint for demonstrations.
"""
