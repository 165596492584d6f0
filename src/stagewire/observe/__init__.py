"""What every process here needs to watch others and to be watched, whatever it does: light, and below the rings.

status_events  what a stage tells its launcher and its API server    processes  whose end is seen, and how
signals        stop signals, whatever the main thread does           streams    output that nobody takes
timings        where the time of each step went                      deadlines  how long a step may be away
"""
