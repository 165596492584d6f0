"""What travels between stages, and nothing about how it gets there.

    messages    the vocabulary: every message as a typed struct, and its number
    codec       messages to frames and back; versions, limits, the only place that knows the bytes
    tensors     which tensors may cross a stage boundary, and how many bytes they must have

No socket, no torch, no vLLM. Whatever bytes a peer sends, decoding gives a message or a ProtocolError.
"""
