"""The ring of stages: who is connected to whom, whether the pipeline is whole, and who learns of a loss.

    runtime       gives a node its thread; what the rest of the package uses
    node          runs a state over a transport, one turn at a time
    zmq_link      the transport over ZeroMQ; the only file that imports zmq
    intake        how much a connection has brought without a whole message, by the kernel's own count
    security      who may take part: the key file, local sockets, which address needs what; reads files, no socket
    link          what a transport must do, and the one that lives in memory
    state         the rules, as a pure state machine: events in, actions out; the ring as a whole
    predecessor   its part for the link to the predecessor
    successor     its part for the link from the successor
    rendezvous    its part for a port that several stages of a host share
    admission     who may take part, who is wrong when two stages differ, the words of a refusal
    actions       what the rules decide, as values

Imports point down this list. A decision belongs in state or a part of it, bytes on a connection in a link, a queue or
a thread in node and runtime.
"""
