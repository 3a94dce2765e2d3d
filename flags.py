"""Command-line flags: a dataclass is a heading, a field of it is a flag; a user's mistake is one line and exit code 2.

  flag, Bins      declare a flag, with its bounds
  parse           command line -> dataclass of dataclasses; flag beats preset beats default
  typed, values   the names that config.json knows
  UserError, command, check    how a command ends that cannot go on
Not here: what the flags mean (each beside the code that reads it), conflicts between them (CONFLICTS in msd.py and o2mkd.py).
"""
import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import shlex
import sys
import types
import typing
import zipfile
from typing import NamedTuple

import torch


class UserError(Exception):
    """A mistake that the user can mend: `command` prints it as one line and exits with code 2."""


def said(error: BaseException) -> str | None:
    """The line for an error that is the user's or the machine's, None for one that is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory is full; --micro-batch N takes N samples at a time through a network, with the same result"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (json.JSONDecodeError, zipfile.BadZipFile)):
        return f"a damaged file: {error}"
    return None


def command(main):
    """Decorator of every `main(argv=None)`: what `said` knows ends with its line and code 2, Ctrl-C with 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except KeyboardInterrupt:
            again = shlex.join([sys.executable, *sys.argv])
            print(f"\ninterrupted; the same command goes on from its last checkpoint:\n  {again}", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            raise SystemExit(1) from None
        except Exception as error:
            line = said(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr, flush=True)
            if torch.distributed.is_initialized():
                os._exit(2)  # the engine's threads, without their peers, would end as a crash
            raise SystemExit(2) from None
    return wrapped


class Bins(NamedTuple):
    """Noise levels low to high, both drawn, of the 1000 of edm.sigma_bins: 0 to 999."""
    low: int
    high: int


def flag(default, help: str, *, choices=(), low=None, below=math.inf, pattern="", name: str = "", record: bool = True):
    """A dataclass field that becomes a flag: --PREFIX-FIELD, PREFIX the class's `prefix`, or --NAME.

    choices, low (allowed), below (not allowed), pattern (of the whole text): what is accepted; nan and inf never are.
    record: does it determine the result of its stage, so that it stands in config.json?"""
    meta = dict(help=help, choices=choices, low=low, below=below, pattern=pattern, name=name, record=record)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def typed(cls, field) -> str:
    """The name of a field in config.json, adm_steps; on the command line --adm-steps."""
    return field.metadata["name"] or cls.prefix + field.name


def option(name: str) -> str:
    """adm_steps -> --adm-steps; a symbol keeps its paper's spelling: --P_mean."""
    return "--" + (name if name[0].isupper() or name.startswith("S_") else name.replace("_", "-"))


def values(group, *names: str) -> dict:
    """{typed name: value} of a group's fields: of those named, or of all that determine a result."""
    fields = [f for f in dataclasses.fields(group) if (f.name in names if names else f.metadata["record"])]
    return {typed(type(group), f): getattr(group, f.name) for f in fields}


def settings(flags, group: str, uses: dict) -> dict:
    """What determines a stage's result, by the names in config.json: the group's own flags, and those of
    uses {name: where it is, such as "dm.warmup"}."""
    out = values(vars(flags)[group]) if group in vars(flags) else {}
    for name, path in uses.items():
        value = flags
        for step in path.split("."):
            value = vars(value)[step]
        out[name] = value
    return out


def near(word: str, words) -> str:
    """To end an error message with: "; did you mean …?", or nothing."""
    close = difflib.get_close_matches(word, map(str, words), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage text
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        hint = near(unknown, self._option_string_actions) if unknown.startswith("-") else ""
        raise UserError(message + hint + " (--help lists every flag)")


def _kind(hint):
    """How argparse reads a field of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if hint is Bins:
        return dict(type=int, nargs=2, metavar=("LOW", "HIGH"))
    if origin is list:
        return dict(type=inner[0], nargs="+", metavar=inner[0].__name__)
    if origin is tuple:  # words in one argument: tsm,dm,adm
        return dict(type=lambda text: tuple(word.strip() for word in text.split(",")), metavar="word,word")
    return dict(type=hint, metavar=hint.__name__)


def _check(name: str, value, hint, meta) -> None:
    """Is this value allowed? UserError if not."""
    for v in value if isinstance(value, (tuple, list)) else [value]:
        if meta["choices"] and v not in meta["choices"]:
            known = ", ".join(map(str, meta["choices"]))
            raise UserError(f"{name} {v}: no such choice{near(str(v), meta['choices'])} (one of {known})")
        if meta["low"] is not None and not meta["low"] <= v < min(meta["below"], 2 ** 62):
            most = f" and below {meta['below']}" if meta["below"] < math.inf else ""
            raise UserError(f"{name} {v}: must be a number, at least {meta['low']}{most}")
    if meta["pattern"] and not re.fullmatch(meta["pattern"], value):
        raise UserError(f"{name} {value[:80]}: must match {meta['pattern']}")
    if hint is Bins and not 0 <= value.low <= value.high <= 999:
        raise UserError(f"{name} {value.low} {value.high}: lowest and highest of 0 to 999")


def parse(cls, presets: dict, argv=None, doc: str = ""):
    """Command line -> cls, whose fields are flags, or groups of flags (dataclasses): flags.adm.steps is --adm-steps.

    presets: {group ("" = cls itself): {(dataset, preset) or (dataset, preset, student size): {field: value}}}; "like" in
    the group "run": the dataset whose values hold where a dataset has none of its own. Raises UserError on any misuse."""
    hints = typing.get_type_hints(cls)
    groups = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    table = {}  # typed name: (group, field, type)
    for group, part in {"": cls, **groups}.items():
        heading = parser.add_argument_group((part.__doc__ or "").splitlines()[0])
        hint_of = typing.get_type_hints(part)
        for f in dataclasses.fields(part):
            if f.name in groups and not group:
                continue
            name = typed(part, f)
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            shown = (" " if isinstance(default, list) else ",").join(map(str, default)) if isinstance(default, (list, tuple)) else default
            text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
            heading.add_argument(option(name), dest=name, help=text, default=argparse.SUPPRESS, **_kind(hint_of[f.name]))
            table[name] = group, f, hint_of[f.name]
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        group, f, hint = table[name]
        given[name] = value = Bins(*value) if hint is Bins else value
        _check(option(name), value, hint, f.metadata)
    known = {name: given.get(name, f.default) for name, (_, f, _) in table.items() if name in ("dataset", "preset", "student_size")}
    dataset, preset, size = (known.get(name) for name in ("dataset", "preset", "student_size"))
    lines = presets.get("run", {(dataset, preset): {}})
    if (dataset, preset) not in lines:
        names = [key[1] for key in lines if key[0] == dataset]
        raise UserError(f"--preset {preset}: not known for {dataset}{near(preset, names)} (one of {', '.join(names)})")
    like, source, made = lines[dataset, preset].get("like", dataset), {}, {}
    for group, part in {"": cls, **groups}.items():
        chosen = {}
        for key in ((like, preset), (dataset, preset), (like, preset, size)):
            chosen |= presets.get(group, {}).get(key, {})
        chosen.pop("like", None)
        own = {f.name: (name, Bins(*chosen[f.name]) if hint is Bins and f.name in chosen else chosen.get(f.name))
               for name, (g, f, hint) in table.items() if g == group}
        taken = {}
        for field, (name, value) in own.items():
            source[name] = "flag" if name in given else f"preset {preset}" if field in chosen else "default"
            if source[name] != "default":
                taken[field] = given.get(name, value)
        made[group] = taken
    out = cls(**made.pop(""), **{group: groups[group](**taken) for group, taken in made.items()})
    out.source = source
    return out


def check(flags, conflicts) -> None:
    """conflicts: [(is it so? flags -> bool, what to say, a format of f)]; the first that is so is a UserError."""
    for so, text in conflicts:
        if so(flags):
            raise UserError(text.format(f=flags))


def describe(flags) -> str:
    """Every flag with its value and source, one line each: the body of --dry-run."""
    rows = []
    for field in dataclasses.fields(flags):
        group = getattr(flags, field.name)
        part = [(type(group), f, getattr(group, f.name)) for f in dataclasses.fields(group)] if dataclasses.is_dataclass(group) \
            else [(type(flags), field, group)]
        for cls, f, value in part:
            name, shown = typed(cls, f), " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            rows.append(f"  {option(name):<18} {shown!s:<12} {flags.source[name]:<17} {f.metadata['help']}")
    return "\n".join(rows)
