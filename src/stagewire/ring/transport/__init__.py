"""The ring's connections: how bytes travel between stages, and who is at the other end.

    zmq_transport   the transport over ZeroMQ
    callers         who calls this stage: what each connection brings, and whether the answers arrive
    diagnosis       why a connection did not come up
    link            one outgoing connection, the probe beside it, and when it counts as lost
    routes          the ways to an address, and which is tried next
    listener        where this stage listens, and what becomes of that
    probe           heartbeats beside a link
    sockets         what all sockets have set
    curve           the ring's key on sockets, and the check of each caller
    greeting        what a port says first, or why it cannot be reached
    tcp_counters    what a TCP connection has brought and delivered, by the kernel's count
    security        who may take part: the key file, the folder of local sockets, which address needs what
    hosts           which addresses are this machine's, and on which one a stage listens
    memory          a transport within one process, for tests
    interface       what a transport must do, and the events that it reports

Imports point down this list. Only files of this package import zmq. A transport moves frames and reports connections.
It decides nothing about the ring (stagewire.ring.rules).
"""
