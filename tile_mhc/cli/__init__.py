"""The `tile-mhc` command: compile kernels ahead of time, time them, examine and clean the cache."""

import os
import sys
from collections.abc import Sequence

import click

from tile_mhc import __version__
from tile_mhc.cli._bench import bench_command
from tile_mhc.cli._clean import clean_command
from tile_mhc.cli._compile import compile_command
from tile_mhc.cli._doctor import doctor_command
from tile_mhc.cli._list import list_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tile-mhc")
def app() -> None:
    """Compile tile_mhc's kernels ahead of time, time them, and look after their cache."""


app.add_command(compile_command)
app.add_command(list_command)
app.add_command(doctor_command)
app.add_command(bench_command)
app.add_command(clean_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every failure is one line on stderr and a non-zero return."""
    try:
        result = app.main(arguments, prog_name="tile-mhc", standalone_mode=False)
    except click.Abort:
        return _fail("aborted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "tile-mhc"
        return _fail(f"{error.format_message()} (see `{command} --help`)", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("TILE_MHC_TRACEBACK", "0") != "0":
            raise
        text = " ".join(str(error).split())
        return _fail(
            f"{type(error).__name__}: {text} (TILE_MHC_TRACEBACK=1 shows where it comes from)", 1
        )
    return result if isinstance(result, int) else 0


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _fail(message: str, code: int) -> int:
    click.echo(f"tile-mhc: error: {' '.join(message.split())}", err=True)
    return code
