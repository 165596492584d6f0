"""One process's end of the ring: what it tells the others, what it remembers for them, how it ends with them."""
