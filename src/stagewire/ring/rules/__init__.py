"""The rules of the ring, as a pure state machine: events in, actions out.

    state         one stage's view of the ring: takes each event to the part that decides
    linking       the part for greetings: who becomes a neighbour, and who is refused
    epochs        the part for epochs: roll call, opening, loss; owns the phase
    waiting       the part for a ring that is not whole: whom this stage waits for, how long, and what it says
    predecessor   the part for the link to the predecessor
    successor     the part for the link from the successor
    rendezvous    the part for a port that several stages of a host share
    phases        the tables: which phase follows which, and which message counts when
    admission     who may take part, who is wrong when two stages differ, the words of a refusal
    notices       warnings that are given once
    actions       what the rules decide, as values
    timeouts      every time limit of the ring: when a silent peer is lost, and all other waits

Imports point down this list. Nothing here knows a socket, a clock, a thread, torch or vLLM: times are arguments.
"""
