"""Writes docs/reference/flags.md from the parsers themselves: `.venv/bin/python scripts/docs_pages.py`.

tests/unit/test_docs_pages.py compares the page with what this makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from stagewire import cli
from stagewire.vllm_plugin.entry.flags import add_flags

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "flags.md"
BEGINNING = """\
# Flags

`scripts/docs_pages.py` makes this page from the parsers. A change goes into the help texts in the source.

## vllm serve

`vllm serve --help=Stagewire` prints these. They may stand in a `--config` file of vLLM, too. Without
`--pipeline-stage-mode` nothing of vLLM changes. [Configuration](configuration.md) has a stage's other settings, and
[deadlines](deadlines.md) what the timeouts end.
"""
COMMANDS = """\
## stagewire

`stagewire COMMAND --help` prints these. Three tools take the same options and need no installation: `plan` is
`tools/offline_pipelining/validate_layer_ranges.py`, `export` is `tools/offline_pipelining/serve_pipeline.py`, and
`front` is `tools/offline_pipelining/http_index.py`.
"""


def render() -> str:
    """The whole page."""
    flags = argparse.ArgumentParser(add_help=False)
    add_flags(flags)
    lines = [BEGINNING, *_table(flags), "", COMMANDS.rstrip("\n")]
    for name, summary, command in _commands():
        lines += ["", f"### {name}", "", f"{summary[0].upper()}{summary[1:]}.", "", *_table(command)]
    return "\n".join(lines) + "\n"


def _commands() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Every subcommand: its name, its one line of help, its parser."""
    for action in cli._make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {each.dest: each.help or "" for each in action._choices_actions}
            for name, parser in action.choices.items():
                yield name, summaries[name], parser


def _table(parser: argparse.ArgumentParser) -> list[str]:
    rows = ["| flag | meaning |", "|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            rows.append(f"| {_spelling(action)} | {_meaning(parser, action)} |")
    return rows


def _spelling(action: argparse.Action) -> str:
    """``--ranges START-END ...`` in backticks."""
    names = ", ".join(action.option_strings) or action.dest
    if action.nargs == 0 or not action.option_strings:
        return f"`{names}`"
    choices = ",".join(map(str, action.choices)) if action.choices else ""
    value = action.metavar or (f"{{{choices}}}" if choices else action.dest.rpartition("_")[2].upper())
    dots = " ..." if action.nargs == "+" else ""
    return f"`{names} {f'[{value}]' if action.nargs == '?' else value}{dots}`"


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render())
