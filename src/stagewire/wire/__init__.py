"""The messages between stages. How they are transported is in ring/.

    messages    every message as a typed struct, and its number
    codec       messages to frames and back, versions and limits; only this module knows the bytes
    tensors     which tensors may cross a stage boundary, and how many bytes they must have

No socket, no torch, no vLLM. Whatever bytes a peer sends, decoding gives a message or a ProtocolError.
"""
