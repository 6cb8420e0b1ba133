"""The application that the commands belong to, and the options that several of them have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from .. import __version__
from ..config import shipped_recipes
from ..logs import set_up_logging

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Align a language model for safety and helpfulness, offline, on Ray.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
cluster_app = typer.Typer(help="Cluster files.")
app.add_typer(cluster_app, name="cluster", rich_help_panel="Cluster")


class _Words(TyperCommand):
    """A command whose options of several values take them as words: ``--sets a b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for p in self.params if p.multiple for name in p.opts}
        words: list[str] = []
        option = None
        for word in args:
            if option and not word.startswith("-") and words[-1] != option:
                words.append(option)
            words.append(word)
            if word.startswith("-"):
                option = word if word in several else None
        return super().parse_args(ctx, words)


def command(panel: str, example: str, group: typer.Typer = app, **more: Any) -> Callable[..., Any]:
    example = f"Example: [bold]midpo {example}[/bold]"
    return group.command(cls=_Words, rich_help_panel=panel, epilog=example, **more)


def option(metavar: str | None, help: str, default: str | bool = True) -> Any:
    """An option; ``default`` describes what happens without it, where the value does not."""
    return Option(metavar=metavar, help=help, show_default=default)


Text = str | None
Number = int | None
Words = list[str] | None
Recipe = Annotated[str, Argument(help=f"A YAML file, or one of {', '.join(shipped_recipes())}.")]
_overrides = "Changed keys of the recipe; `midpo config` lists them."
Overrides = Annotated[
    Words, Argument(metavar="[KEY.SUB=VALUE]...", help=_overrides, show_default="none")
]
Address = Annotated[
    Text, option(None, "auto or HOST: a running Ray cluster.", "a cluster of its own")
]
RunDir = Annotated[Text, option("DIR", "Path or URI that every node reaches.", "runs/NAME")]
DryRun = Annotated[bool, Option("--dry-run", help="Print what would be done, and stop.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"midpo_ray {__version__}")
        raise typer.Exit


_version = Option("--version", callback=_print_version, is_eager=True, help="Print the version.")


@app.callback()
def _options(
    verbose: Annotated[bool, Option("-v", "--verbose", help="Show details.")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Show only warnings and results.")] = False,
    version: Annotated[bool, _version] = False,
) -> None:
    set_up_logging(verbose - quiet)
