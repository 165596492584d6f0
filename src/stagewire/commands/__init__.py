"""The bodies of subcommands that are also tools of their own. Each module: `add_arguments(parser)` and `run(args)`."""
