"""Starting local stages and watching them: what is decided before a start, the supervisor, what it needs to know.

    decision    from what is asked for to a `Launch`    early      vLLM's arguments that a launcher must know
    spec        what stages are started with            resources  cores, GPUs (gpus) and libraries of each stage
    supervisor  the loop over all events                loop       an event loop that takes signals
    local_stage one started stage                       pace       whether a stage that starts gets on
    restarts    what follows when a stage ends          hints      why it ended, from its log
    api         the head's HTTP API, as its first client; examples: what to ask which model
    logs        the folder of the stages' logs          orphans    children that process 1 of a container inherits

Prints nothing: a `Screen` is told, and commands/ draws.
"""
