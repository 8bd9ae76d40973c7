"""The commands: parse, call, one clear error, an exit code. Everything heavy is imported inside a command.

Exit codes: 0 done, 1 what was inspected disagrees, 64 wrong run file or command line, 65 wrong data, 66 wrong model or
checkpoint, 70 a defect of lensmith, 74 the run could not go on, 130/143 stopped by SIGINT/SIGTERM after a save.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lensmith.core.errors import EXIT_CRASH, ConfigError, DataError, RunError, UserError

if TYPE_CHECKING:
    from lensmith.migrate.convert import Migrated
    from lensmith.recipe.run import Located
    from lensmith.report.terminal import Terminal

app = typer.Typer(
    help="Fine-tune vision-language models and trust the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(help="Run file (YAML), a run folder, or a YAML file of LLaMA-Factory.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes on top of the file: key.sub=value.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what goes wrong.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for scripts.")]


def _terminal(quiet: bool, as_json: bool) -> Terminal:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked after the tokenizer was used
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table has letters that an ASCII locale lacks
    from lensmith.report.terminal import Terminal

    return Terminal("json" if as_json else "quiet" if quiet else "normal")


def _load(run: Path, overrides: list[str] | None, terminal: Terminal | None) -> tuple[Located, Migrated | None]:
    """The run of a file. What becomes of a LLaMA-Factory file is said once, to `terminal`."""
    from lensmith.migrate.convert import load_any
    from lensmith.migrate.write import say

    located, migrated = load_any(run, overrides or ())
    if migrated is not None and terminal is not None:
        say(migrated, terminal, f"{run} as a lensmith run")
    return located, migrated


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything, one step, nothing kept.")] = False,
    ray: Annotated[str | None, typer.Option(help="On a Ray cluster: its address, `auto` or `local`.")] = None,
    ray_storage: Annotated[str | None, typer.Option(help="For Ray's own state. Left out: the run folder.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, or go on with a run that was interrupted."""
    faulthandler.enable(sys.__stderr__ or 2)  # a crash in native code leaves a trace
    terminal = _terminal(quiet, as_json)
    from lensmith.parallel.exits import is_rank
    from lensmith.parallel.launch import launch
    from lensmith.recipe.train import train as run_training

    first = os.environ.get("RANK", "0") == "0"
    located, migrated = _load(run, overrides, terminal if first and _IS_SAID not in os.environ else None)
    parallel = located.run.parallel
    if migrated is not None:
        os.environ[_IS_SAID] = "1"  # the ranks that this one starts need not say it again
        if first and not dry_run:
            from lensmith.migrate.convert import record

            record(migrated, located.output)
        if migrated.launch.torchrun:
            os.execv(sys.executable, [*migrated.launch.torchrun, *sys.argv[1:]])
        ray = ray or ("auto" if migrated.launch.ray else None)
    if ray is not None:
        from lensmith.recipe.train_ray import train_on_ray

        train_on_ray(located, terminal, address=ray, storage=ray_storage, dry_run=dry_run)
        return
    if parallel.ranks == 1 or is_rank():
        run_training(located, terminal=terminal, dry_run=dry_run)
        return
    flags = [flag for flag, given in (("--dry-run", dry_run), ("--quiet", quiet), ("--json", as_json)) if given]
    output = None if dry_run else located.output
    arguments = ["train", str(run), *(overrides or ()), *flags]
    ended = launch(arguments, ranks=parallel.ranks, restarts=parallel.restarts, output=output, terminal=terminal)
    raise typer.Exit(ended)


_IS_SAID = "LENSMITH_MIGRATION_SAID"


@app.command()
def migrate(
    file: Annotated[Path, typer.Argument(help="A YAML file of LLaMA-Factory.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run file. Left out: NAME.lensmith.yaml beside the file.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that the batch is for. Left out: as the environment says.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the lensmith run file that a LLaMA-Factory file stands for, with a decision on every key."""
    terminal = _terminal(quiet, as_json)
    from lensmith.config.yaml_file import read_tree
    from lensmith.migrate.convert import migrate as make_run
    from lensmith.migrate.given import is_llamafactory
    from lensmith.migrate.write import say, write

    tree = read_tree(file)
    if not is_llamafactory(tree):
        raise ConfigError("MIGRATE", "this is no file of LLaMA-Factory: it has no model_name_or_path", where=str(file),
                          remedy="name one; run files of lensmith need no migration")  # fmt: skip
    migrated = make_run(tree, overrides or (), ranks=ranks)
    path = write(migrated, file, output)
    say(migrated, terminal, f"{file} -> {path}")
    terminal.event("migrate", f"written: {path}", path=str(path))


@app.command()
def check(run: RunFile, overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Read the run file and index the data; say what would train and what is dropped. Loads no weights."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.check import check as check_run

    check_run(_load(run, overrides, terminal)[0], terminal)


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas between.")] = "1,8,64",
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s, 4090; cpu: measure this machine.")] = "h100",
    price: Annotated[float | None, typer.Option(help="Dollars of one device for an hour.")] = None,
    network: Annotated[
        float | None, typer.Option(help="GB/s that a rank sends to other nodes. Left out: as the device has.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that rows reach. Left out: predicted.")] = None,
    samples_per_rank: Annotated[int | None, typer.Option(help="Samples of a step for each rank.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Memory, traffic, time and cost of the run on more ranks and other devices. Loads no weights."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.scaling import Ask, numbers_of
    from lensmith.recipe.scaling import plan as plan_run

    bytes_of = None if network is None else network * 1e9
    ask = Ask(numbers_of(ranks), device, price, bytes_of, mfu, samples_per_rank)
    said = [terminal]  # a run is read several times, with changes
    plan_run(run, overrides or (), terminal, ask,
             lambda file, more: _load(Path(file), [*more], said.pop() if said else None)[0])  # fmt: skip


@app.command()
def data(
    run: RunFile,
    overrides: Overrides = None,
    hashes: Annotated[bool, typer.Option("--hash", help="Read every picture: duplicates, one colour, broken.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for data.html; left out, that of the run.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what is in the data, source by source, and write it as a page. Loads no weights."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.data import data as describe_data

    describe_data(_load(run, overrides, terminal)[0], terminal, hashes=hashes, output=output)


@app.command()
def index(
    run: RunFile,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Processes. Left out: all processors.")] = None,
    ray: Annotated[str | None, typer.Option(help="On a Ray cluster: its address, `auto` or `local`.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, to find broken ones now.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make the index of the data ahead, so that check and train start at once. Loads no weights."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.index import index as make_index

    make_index(_load(run, overrides, terminal)[0], terminal, workers=workers, ray=ray, decode=decode)


@app.command()
def show(
    run: RunFile,
    number: Annotated[int, typer.Argument(help="Which sample, counted from 0 over the rows read.")],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Of a curriculum, the stage. Left out: the first.")] = None,
    as_json: Json = False,
) -> None:
    """One sample as the model sees it: trained tokens in colour, image blocks, patch grid."""
    terminal = _terminal(False, as_json)
    from lensmith.recipe.show import show as show_sample

    show_sample(_load(run, overrides, terminal)[0].of(stage), number, terminal)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint, a run folder (its newest), an adapter folder, or a URL of save.remote.")
    ],
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    base: Annotated[str | None, typer.Option(help="Base model of an adapter, if not where its config says.")] = None,
    merge: Annotated[bool, typer.Option(help="Merge an adapter into full weights; else copy the adapter.")] = True,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Left out: the base model's.")] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest file of weights, in GB.")] = 5.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model folder that transformers and vLLM load: adapters merged, one dtype, sharded."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.export import export as export_model

    export_model(checkpoint, output, base=base, merge=merge, dtype=dtype, shard_gb=shard_gb, terminal=terminal)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter folder of any tool, a checkpoint or a run.")],
    values: Annotated[bool, typer.Option("--values", help="Read every value too: NaN, infinity, two heads.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write the folder anew in one type; the old one is kept beside it.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of --repair: bfloat16, float16 or float32. Left out: the one that is meant.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Types, config and tensors of a folder; what vLLM and flash-attention refuse. Exit status 1 if any disagree."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.inspect import inspect_folder

    raise typer.Exit(inspect_folder(checkpoint, values=values, repair=repair, dtype=dtype, terminal=terminal))


@app.command()
def replay(
    incident: Annotated[Path, typer.Argument(help="Folder of an incident: RUN/incidents/step-NNNNNN.")],
    device: Annotated[str | None, typer.Option(help="Where to compute. Left out: as the run did.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model's folder, if not where the run had it.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compute a step that was not finite again and name its module. Exit status 1 if something else is found."""
    terminal = _terminal(quiet, as_json)
    from lensmith.recipe.replay import replay as replay_incident

    raise typer.Exit(replay_incident(incident, terminal, device=device, base=base))


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="Run folder.")], quiet: Quiet = False, as_json: Json = False
) -> None:
    """Make report.html and loss.png of a run folder anew."""
    terminal = _terminal(quiet, as_json)
    from lensmith.report.page import write_report

    if not any((run_folder / name).is_file() for name in ("run.yaml", "metrics.jsonl", "summary.json")):
        raise DataError(
            "RUN_FOLDER", "no run has left anything here", where=str(run_folder), remedy="name a run folder"
        )
    path = write_report(run_folder)
    terminal.event("report", str(path), path=str(path))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for data and run.")] = Path("quickstart"),
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the tiny embedded model on real pictures: CPU, about five minutes, with a report."""
    terminal = _terminal(quiet, as_json)
    from lensmith.quickstart.command import quickstart as start

    start(output, overrides or (), terminal)


@app.command()
def schema() -> None:
    """Print the JSON schema of run files, for editors."""
    import json

    from lensmith.config.build import json_schema
    from lensmith.recipe.run import Run

    print(json.dumps(json_schema(Run), indent=1))


def _version(value: bool) -> None:
    if value:
        from lensmith import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
            errno.ENFILE, errno.EFBIG, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}  # fmt: skip
"""What the machine refuses: no defect, and a traceback would not help."""


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. A `UserError` is one message on stderr; anything else is a traceback and exit code 70."""
    from lensmith.parallel.exits import leave_code

    try:
        _run(arguments)
    except SystemExit as done:
        sys.exit(leave_code(done.code if isinstance(done.code, int) else 0))


def _run(arguments: list[str] | None) -> None:
    try:
        app(arguments)
    except SystemExit as done:  # Typer's own code for a wrong command line is 2
        sys.exit(ConfigError.exit_code if done.code == 2 else done.code)
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the border of the program: every defect gets the same exit code
        from lensmith.engine.loop import Interrupted

        if isinstance(error, Interrupted):
            _say(str(error), "OTHER_RANK")  # each of several ranks has it
            sys.exit(error.exit_code)
        if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
            text = f"this locale's encoding ({sys.getfilesystemencoding()}) has no way to write {error.object!r:.200}"
            _fail(RunError("LOCALE", text, remedy="set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"))
        if isinstance(error, OSError) and error.errno in _MACHINE:
            remedy = "look at the space, the permissions and the kind of this path"
            _fail(RunError("MACHINE", error.strerror or "failed", where=str(error.filename or ""), remedy=remedy))
        import traceback

        traceback.print_exc()
        _say("this is a defect of lensmith, not of your run; please report it with the lines above")
        sys.exit(EXIT_CRASH)


def _fail(error: UserError) -> NoReturn:
    from lensmith.parallel.exits import leave_code

    _say(error.render(), error.code)
    leave_code(error.exit_code, error.code)
    sys.exit(error.exit_code)


def _say(text: str, code: str = "") -> None:
    from lensmith.parallel.exits import speaker
    from lensmith.report.escape import terminal_safe

    if (who := speaker(code)) is None:
        return
    for line in f"{who}{text}".split("\n"):
        print(terminal_safe(line), file=sys.stderr)
