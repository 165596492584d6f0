"""One process's end of the ring: its identity and reports, the journal, and how the process ends with the ring."""
