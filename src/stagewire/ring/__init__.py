"""The ring of stages: who is connected to whom, whether the pipeline is whole, and who learns of a loss.

    ring        one stage's end of the ring: its thread; what the rest of the package uses
    observer    what the rest of the process learns of it
    transport/  connections: bytes between stages; only there is zmq imported
    rules/      decisions, as a pure state machine: events in, actions out; every time limit is in its timeouts

Imports point down this list. The transport uses of the rules only the names of actions, and timeouts. A decision about
the ring belongs into rules, bytes on a connection into transport, queues and the thread into ring.
"""
