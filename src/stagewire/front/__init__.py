"""The HTTP front: one public port before the head's.

    server  the public port, and for how long it is served
    app     which request is answered here and which is the head's; whether a token would go round the ring
    proxy   one request to the head and its answer back

Imports point down this list. Knows HTTP and what it is told of local stages; starts nothing but itself.
"""
