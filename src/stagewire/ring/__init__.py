"""The ring of stages: who is connected to whom, whether the pipeline is whole, and who learns of a loss.

    state       the rules, as a pure state machine: events in, actions out
    link        what a transport must do, and the one that lives in memory
    zmq_link    the transport over ZeroMQ; the only file that imports zmq
    node        runs a state over a transport, one turn at a time
    runtime     gives a node its thread; what the rest of the package uses

A decision belongs in state, bytes on a connection in a link, a queue or a thread in node and runtime.
"""
