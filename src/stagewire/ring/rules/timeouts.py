"""Every time limit of the ring.

This is the one place that says after how long a silent peer is lost, when a wait is given up, and how often something
is repeated. The modules that apply these numbers read them from here and own no limit of their own.

When a peer counts as lost:

    what this stage sees                                 after                              applied in
    the connection ends, as after a kill                 at once                            transport/link.py
    the peer answers no heartbeat on the probe           PROBE_HEARTBEAT_TIMEOUT_MS, then   transport/probe.py
                                                         PROBE_PATIENCE_S
    the peer has never answered on the probe             FIRST_PROBE_PATIENCE_S             transport/probe.py
    nothing comes by the link, the probe is answered     SILENT_LINK_S + the patience       transport/link.py
    the same, and the probe had to reconnect             DOUBTED_LINK_S + the patience      transport/link.py
    the peer's kernel acknowledges nothing               STALL_S                            transport/callers.py
    a send finds no connection to the successor, and     LOST_SUCCESSOR_S                   rules/successor.py
    no other stage says why
    a newcomer claims the peer's index                   ALIVE_S without the peer's word    rules/admission.py
    the peer does not repeat its registration            ALIVE_S                            rules/rendezvous.py

With these numbers a frozen process is lost after 1.2 to 1.6 s. A loss ends the epoch, not this process. How long a
stage waits for the lost one is the user's setting (`StageConfig.start_timeout_s`, `recovery_timeout_s`), which
rules/waiting.py applies.
"""

from __future__ import annotations

# Times end in _S or _MS. ZeroMQ takes milliseconds.

# ---- a peer is lost ------------------------------------------------------------------------------------------------

PROBE_HEARTBEAT_INTERVAL_MS = 250
PROBE_HEARTBEAT_TIMEOUT_MS = 700
PROBE_HANDSHAKE_TIMEOUT_MS = 2000
PROBE_RETRY_MS = 100
# How long a probe may be down. Only time in which this thread ran counts: a stall of this process is not the peer's.
# A virtual machine may hold one core up for ten seconds. So the patience doubles each time that a peer was lost and
# had only been slow, and the environment variable gives more from the beginning.
PROBE_PATIENCE_ENV = "STAGEWIRE_PEER_PATIENCE_S"
PROBE_PATIENCE_S = 0.6
MAX_LEARNT_PATIENCE_S = 10.0
MAX_PROBE_PATIENCE_S = 60.0
# Until a probe has been up once. With a key the peer's ring thread answers, which imports may hold up.
FIRST_PROBE_PATIENCE_S = 5.0
# The most that one look counts as silence: this thread may not have run in between.
MAX_COUNTED_TURN_S = 0.3

# A stage says something about once a second on every connection that it has accepted, so a link without a word for this
# time is lost. It is long because Python may hold the peer's ring thread up.
SILENT_LINK_S = 90
# The same once the probe had to reconnect: another process may answer in the peer's place.
DOUBTED_LINK_S = 10

# TCP has sent a lost packet again five times by then, and nothing at all was acknowledged.
STALL_S = 6.0
STALL_LOOK_INTERVAL_S = 1.0
# A successor pings once a second. If it was heard within this time, it lives, and only large packets are lost.
SMALL_TALK_S = 3.0

# The other stages see the successor's end as well, and their Fault or Bye says why. After this time without one, this
# stage reports the loss itself.
LOST_SUCCESSOR_S = 2.0

# A newcomer with the index of a stage that has said nothing for this time takes its place.
ALIVE_S = 5.0

# ---- a wait is given up --------------------------------------------------------------------------------------------

CONNECT_TIMEOUT_MS = 5000
# A port that accepts and says nothing is given up after this time; ZeroMQ's default is 30 s.
HANDSHAKE_TIMEOUT_MS = 5000
# What accepts connections but never answers like a stage is not a stage.
MUTE_PEER_S = 30.0
# The owner of a shared port answers at once unless it is no stage. Python may hold it up while it imports.
MUTE_OWNER_S = 10.0
# An Open that has not come round by then was lost.
OPENING_TIMEOUT_S = 5.0
# If there are several ways to an address, a peer that says "the stage is not here" gets this long to learn of it.
OTHER_WAY_INTERVAL_S = 1.0
# The owner of a shared port forgets a stage that is gone after ALIVE_S. If it redirects to a port that nobody reaches
# for longer, the port needs to be forwarded.
FORWARDING_S = 8.0
# For each step of asking a port what it is.
GREETING_TIMEOUT_S = 0.3
# From the end of a ring until its last messages have left and its sockets are closed.
END_S = 5.0

# ---- something is repeated -----------------------------------------------------------------------------------------

# A Hello may come before the predecessor knows that the earlier process is gone. The answer is then "ask again".
HELLO_INTERVAL_S = 0.25
PING_INTERVAL_S = 1.0
REGISTER_INTERVAL_S = 1.0
ROLL_INTERVAL_S = 1.0
REPORT_INTERVAL_S = 1.0
BIND_INTERVAL_S = 1.0
RECONNECT_DELAY_S = 0.2
WAIT_LINE_INTERVAL_S = 10.0
# How long the ring's thread sleeps at most, and how often the transport looks at its connections and at its own
# address.
TURN_S = 0.2
CONNECTIONS_LOOK_INTERVAL_S = 0.1
LISTENER_LOOK_INTERVAL_S = 1.0
