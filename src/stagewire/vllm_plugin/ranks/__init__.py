"""All tensor parallel ranks of a stage as one: a leader, its followers, and their messages."""
