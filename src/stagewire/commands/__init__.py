"""What a person types, and what is printed. Each subcommand has one module of its name: `add_arguments`, `run`.

The others are shared: the arguments and lines of a launch (launching.py) and of a question about a split
(split_question.py), the progress screen, what to copy once a ring serves (usage.py), the text of a plan.
"""
