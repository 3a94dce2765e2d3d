"""Command-line flags: a dataclass is a heading, a field of it is a flag; a user's mistake is one line and exit code 2.

`flag` declares one, `parse` reads a command line; config.json knows it by its `typed` name. Not here: what the flags
mean (beside the code that reads them) and what excludes what (CONFLICTS in msd.py and o2mkd.py).
"""
import argparse
import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import sys
import traceback
import typing
from urllib.error import URLError

import torch

if sys.version_info < (3, 10):
    sys.exit("error: Python 3.10 or newer is needed")


class UserError(Exception):
    """A mistake that the user can mend, told in a line."""


def of_machine(error: BaseException) -> bool:
    """Is it the system's, not the file's that is read: a failing disk, no net, no memory?"""
    return isinstance(error, URLError) or getattr(error, "errno", None) is not None or no_memory(error)


def no_memory(error: BaseException) -> bool:
    """Of the processor, or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def said(error: BaseException) -> str:
    """The line for an error, whatever raised it."""
    if isinstance(error, UserError):
        return str(error)
    if no_memory(error):
        return f"the memory is full; --micro-batch N takes N samples at a time ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'system'}: {error.strerror}"
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
        return f"another rank stopped, and says why itself: {error}"
    return f"{type(error).__name__}: {error}".partition("\n")[0] + " (MSD_DEBUG=1 shows where)"


def command(main):
    """Decorator of every main: an error ends with its line and code 2, Ctrl-C with 130. MSD_DEBUG=1: its trace, too."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in filter(lambda s: hasattr(s, "reconfigure"), (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="replace")  # a terminal that has no "…"
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            code = 130
        except Exception as error:
            if os.environ.get("MSD_DEBUG"):
                traceback.print_exc()
            print("error:", said(error).partition("\n")[0], file=sys.stderr, flush=True)
            if torch.distributed.is_initialized():
                os._exit(2)  # the engine's threads, without their peers, would crash
            code = 2
        raise SystemExit(code)
    return wrapped


class Bins(typing.NamedTuple):
    """Noise levels low to high, both drawn, of the 1000 of edm.sigma_bins."""
    low: int
    high: int


def flag(default, help: str, *, choices=(), low=None, below=math.inf, pattern="", name: str = "", record: bool = True):
    """A field that becomes a flag: --PREFIX-FIELD, PREFIX of its class, or --NAME.

    Accepted: choices; numbers from low on, below `below`; texts of this pattern. record: does it determine its stage's
    result, so that it stands in config.json?"""
    meta = dict(help=help, choices=choices, low=low, below=below, pattern=pattern, name=name, record=record)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def _own(group) -> list:
    """Its fields that are flags, not groups."""
    return [f for f in dataclasses.fields(group) if f.metadata]


def typed(cls, field) -> str:
    """The name of a field in config.json, adm_steps; on the command line --adm-steps."""
    return field.metadata["name"] or cls.prefix + field.name


def option(name: str) -> str:
    """adm_steps -> --adm-steps; a symbol keeps its paper's spelling: --P_mean."""
    return "--" + (name if name[0].isupper() else name.replace("_", "-"))


def values(group, *names: str) -> dict:
    """{typed name: value} of a group's fields: of those named, or of all that determine a result."""
    fields = [f for f in _own(group) if (f.name in names if names else f.metadata["record"])]
    return {typed(type(group), f): getattr(group, f.name) for f in fields}


def settings(flags, group: str, uses: dict) -> dict:
    """What determines a stage's result: values of its own group and of uses {name: "dm.warmup", where it is}."""
    own = values(vars(flags)[group]) if group in vars(flags) else {}
    return own | {name: operator.attrgetter(path)(flags) for name, path in uses.items()}


def near(word: str, words) -> str:
    """An error message's end: "; did you mean …?", or nothing."""
    close = difflib.get_close_matches(word, map(str, words), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage text
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        raise UserError(f"{message}{near(unknown, self._option_string_actions)} (--help lists every flag)")


def _kind(hint) -> dict:
    """How argparse reads a field of this type."""
    inner = typing.get_args(hint)
    if hint is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if hint is Bins:
        return dict(type=int, nargs=2, metavar=("LOW", "HIGH"))
    if typing.get_origin(hint) is tuple:  # words in one argument: split,reg
        return dict(type=lambda text: tuple(text.split(",")))
    one = os.path.expanduser if hint is str else hint  # --out=~/x
    return dict(type=inner[0], nargs="+") if inner else dict(type=one)


def _wrong(value, choices, low, below, pattern, **other) -> str:
    """What is not allowed about a value, or nothing."""
    for v in value if isinstance(value, (tuple, list)) else [value]:
        if choices and v not in choices:
            return f"{v}: no such choice{near(str(v), choices)} (one of {', '.join(map(str, choices))})"
        if low is not None and not low <= v < min(below, 2 ** 62):
            return f"{v}: must be at least {low}, and below {below}"
    if pattern and not re.fullmatch(pattern, value):
        return f"{value[:80]}: must match {pattern}"
    if isinstance(value, Bins) and not 0 <= value.low <= value.high <= 999:
        return f"{_shown(value)}: lowest and highest of 0 to 999"
    return ""


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def parse(cls, presets: dict, argv=None, doc: str = ""):
    """Command line -> cls, whose fields are flags or groups of flags. A flag beats a preset beats a default.

    presets: {group ("" = cls itself): {(dataset, preset) or (dataset, preset, student size): {field: value}}}; "like"
    in the group "run": the (dataset, preset) whose values hold where there are none of its own."""
    parts = {"": cls, **{f.name: f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)}}
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    table, default, chosen = {}, {}, {}  # by typed name: (group, field), and values
    for group, part in parts.items():
        heading = parser.add_argument_group(part.__doc__.splitlines()[0])
        for f in _own(part):
            name = typed(part, f)
            table[name] = group, f
            default[name] = f.default_factory() if f.default is dataclasses.MISSING else f.default
            text = f"{f.metadata['help']} [{_shown(default[name])}]".replace("%", "%%")
            heading.add_argument(option(name), dest=name, help=text, default=argparse.SUPPRESS, **_kind(f.type))
    given = vars(parser.parse_args(argv))

    dataset, preset, size = (given.get(name, default.get(name)) for name in ("dataset", "preset", "student_size"))
    lines = presets.get("run", {})
    like = lines.get((dataset, preset), {}).get("like", (dataset, preset))
    for name, (group, f) in table.items():
        for key in (like, (dataset, preset), (*like, size)):
            line = presets.get(group, {}).get(key, {})
            if f.name in line:
                chosen[name] = line[f.name]
    made, best = {group: {} for group in parts}, default | chosen | given
    for name, (group, f) in table.items():
        value = best[name]
        value = Bins(*value) if f.type is Bins else [*dict.fromkeys(value)] if isinstance(value, list) else value
        made[group][f.name] = value
        if name in given and (wrong := _wrong(value, **f.metadata)):
            parser.error(f"{option(name)} {wrong}")
    if lines and (dataset, preset) not in lines:
        names = [key[1] for key in lines if key[0] == dataset]
        parser.error(f"--preset {preset}: not known for {dataset}{near(preset, names)} (one of {', '.join(names)})")
    flags = cls(**made.pop(""), **{group: parts[group](**fields) for group, fields in made.items()})
    flags.source = {n: "flag" if n in given else f"preset {preset}" if n in chosen else "default" for n in table}
    return flags


def check(flags, conflicts) -> None:
    """conflicts: [(is it so? flags -> bool, what to say, a format of f)]; UserError if one is so."""
    for so, text in conflicts:
        if so(flags):
            raise UserError(text.format(f=flags))


def describe(flags) -> str:
    """Every flag with its value and source, for --dry-run."""
    rows = []
    for group in filter(dataclasses.is_dataclass, [*vars(flags).values(), flags]):
        for f in _own(group):
            name, shown = typed(type(group), f), _shown(getattr(group, f.name))
            rows.append(f"  {option(name):<18} {shown:<12} {flags.source[name]:<17} {f.metadata['help']}")
    return "\n".join(rows)
