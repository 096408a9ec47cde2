"""The directive ``command-help``: what ``--help`` of a command and its subcommands says."""

from __future__ import annotations

import argparse
import os
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from actreg_dispatch import cli


def helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the help of each subcommand, by its name."""
    os.environ["COLUMNS"] = "80"  # what argparse wraps lines at
    os.environ["NO_COLOR"] = "1"
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: each.format_help() for name, each in commands.choices.items()}


class CommandHelp(SphinxDirective):
    """Show the help of ``actreg``, a section for each command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        sections: list[nodes.Node] = []
        for name, text in helps(cli._parser()).items():
            section = nodes.section(ids=[f"{self.arguments[0]}-{name}"])
            section += nodes.title("", f"{self.arguments[0]} {name}")
            section += nodes.literal_block("", text, language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
