"""The command line: flags in, exit code out. Every heavy import waits inside the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from glmui import __version__, i18n
from glmui.errors import GlmuiError

if TYPE_CHECKING:
    from glmui.settings import Settings

log = logging.getLogger(__name__)

Flag = tuple[str, dict[str, Any]]  # its name, and what argparse is to know of it

LOG_LEVELS = ("debug", "info", "warning", "error")
MODEL_ACTIONS = ("list", "get", "import", "verify", "remove", "restore")
COMMON: tuple[Flag, ...] = (
    ("--data-dir", {"metavar": "DIR"}),
    ("--device", {"metavar": "auto|cpu|cuda|cuda:N|mps|mixed"}),
    ("--threads", {"metavar": "N", "type": int}),
    ("--log-level", {"choices": LOG_LEVELS}),
)
MEMORY: tuple[Flag, ...] = (
    ("--layers-on-gpu", {"metavar": "N", "type": int}),
    ("--context", {"metavar": "N", "type": int}),
)
EXTRAS: tuple[Flag, ...] = (
    ("--chatglm", {"dest": "chatglm_family", "choices": ("chatglm2", "chatglm3")}),
    ("--prefix", {"metavar": "DIR"}),
    ("--adapter", {"metavar": "DIR"}),
)
SERVE: tuple[Flag, ...] = (
    ("--host", {"metavar": "ADDRESS"}),
    ("--port", {"metavar": "N", "type": int}),
    ("--no-browser", {"dest": "browser", "action": "store_false", "default": None}),
    ("--model", {"metavar": "NAME|DIR"}),
    *EXTRAS,
    ("--starter", {"action": "store_true", "default": None}),
    ("--idle-minutes", {"metavar": "N", "type": float}),
    *MEMORY,
    *COMMON,
)
PARAMS: tuple[Flag, ...] = (
    ("--max-length", {"metavar": "N", "type": int}),
    ("--max-new-tokens", {"metavar": "N", "type": int}),
    ("--temperature", {"metavar": "X", "type": float}),
    ("--top-p", {"metavar": "X", "type": float}),
    ("--top-k", {"metavar": "N", "type": int}),
    ("--repetition-penalty", {"metavar": "X", "type": float}),
    ("--seed", {"metavar": "N", "type": int}),
)
CHAT: tuple[Flag, ...] = (
    ("--model", {"metavar": "NAME|DIR"}),
    *EXTRAS,
    ("--prompt", {"metavar": "TEXT"}),
    ("--system", {"metavar": "TEXT", "default": ""}),
    ("--greedy", {"action": "store_true"}),
    ("--json", {"action": "store_true"}),
    *PARAMS,
    *MEMORY,
    *COMMON,
)
BENCH: tuple[Flag, ...] = (
    ("--model", {"metavar": "NAME|DIR"}),
    ("--random", {"metavar": "chatglm-6b-int4", "choices": ("chatglm-6b-int4", "chatglm3-6b-int4", "tiny")}),
    ("--suite", {"metavar": "appendix", "choices": ("appendix",)}),
    ("--baseline", {"metavar": "NAME|DIR"}),
    ("--html", {"metavar": "FILE"}),
    ("--vram-cap", {"metavar": "GIB", "type": float}),
    ("--json", {"action": "store_true"}),
    *MEMORY,
    *COMMON,
)
DOCTOR: tuple[Flag, ...] = (
    ("--fix", {"action": "store_true"}),
    ("--verify", {"action": "store_true"}),
    ("--json", {"action": "store_true"}),
    ("--model", {"metavar": "NAME|DIR"}),
    ("--host", {"metavar": "ADDRESS"}),
    ("--port", {"metavar": "N", "type": int}),
    *COMMON,
)
QUANTIZE: tuple[Flag, ...] = (
    ("SRC", {}),
    ("DST", {}),
    ("--bits", {"metavar": "4|8", "type": int}),
    ("--group-size", {"metavar": "N", "type": int}),
    ("--quantization-embeddings", {"action": "store_true"}),
    ("--target-gb", {"metavar": "X", "type": float}),
    ("--report", {"action": "store_true"}),
    ("--json", {"action": "store_true"}),
    *COMMON,
)

PLAN: tuple[Flag, ...] = (
    ("--model", {"metavar": "NAME|DIR"}),
    ("--vram", {"metavar": "GIB", "type": float, "action": "append", "default": []}),
    ("--ram", {"metavar": "GIB", "type": float}),
    *MEMORY,
    ("--vram-reserve-gb", {"metavar": "GB", "type": float}),
    ("--head-bits", {"choices": ("16", "8")}),
    ("--kv-cache", {"choices": ("auto", "fp32", "fp16", "bf16", "int8")}),
    ("--quantize", {"choices": ("none", "int8", "int4")}),
    ("--json", {"action": "store_true"}),
    *COMMON,
)
MODELS: tuple[Flag, ...] = (
    ("ACTION", {"metavar": "ACTION", "nargs": "?", "default": "list", "choices": MODEL_ACTIONS}),
    ("WHAT", {"nargs": "?", "default": "", "metavar": "NAME|DIR"}),
    ("--name", {"metavar": "NAME", "default": ""}),
    ("--quantize", {"metavar": "int8|int4", "choices": ("none", "int8", "int4"), "default": "none"}),
    ("--accept-licence", {"action": "store_true"}),
    ("--trust", {"action": "store_true"}),
    ("--now", {"action": "store_true"}),
    ("--json", {"action": "store_true"}),
    *COMMON,
)


def serve(options: argparse.Namespace, language: str) -> int:
    """The page. `language` is the terminal's."""
    from glmui import server

    names = ("host", "port", "browser", "starter", "idle_minutes", *_MODEL_SETTINGS)
    return server.serve(_load(options, *names), language)


def chat(options: argparse.Namespace, language: str) -> int:
    """One answer, or a conversation in the terminal."""
    from glmui.errors import InvalidInput
    from glmui.tools.chat import Wish, run
    from glmui.types import GenerationParams

    loaded = _load(options, *_MODEL_SETTINGS)
    if not loaded.model:
        raise InvalidInput("model_not_named")
    if options.json and options.prompt is None:
        raise InvalidInput("json_needs_prompt")
    names = [flag.removeprefix("--").replace("-", "_") for flag, _ in PARAMS]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    params = GenerationParams(**{**given, **({"temperature": 0.0} if options.greedy else {})})
    return run(Wish(loaded.model, options.prompt, params, options.system, options.json), loaded, language)


def bench(options: argparse.Namespace, language: str) -> int:
    """How fast a model runs here."""
    from glmui.errors import InvalidInput
    from glmui.tools.bench import Wish, run

    loaded = _load(options, "model", *_MEMORY_SETTINGS)
    if (options.model and options.random) or not (loaded.model or options.random):
        raise InvalidInput("bench_model_or_random")
    if options.suite:
        from glmui.tools import suite

        if options.random:
            raise InvalidInput("bench_suite_model")
        wish = suite.Wish(loaded.model, options.baseline or "", options.html or "", options.json)
        return suite.run(wish, loaded, language)
    if options.baseline or options.html:
        raise InvalidInput("bench_suite_missing")
    return run(Wish(loaded.model, options.random or "", options.vram_cap, options.json), loaded, language)


def doctor(options: argparse.Namespace, language: str) -> int:
    """What is wrong here, and what to do about it."""
    from glmui.tools.doctor import Wish, run

    flags = _given(options, "model", "host", "port")
    return run(Wish(options.json, options.fix, options.verify), flags, language)


def quantize(options: argparse.Namespace, language: str) -> int:
    """A float16 ChatGLM folder, made smaller."""
    from glmui.errors import InvalidInput
    from glmui.hub import installed
    from glmui.quantizing.job import QuantizeJob
    from glmui.tools.quantize import run

    loaded = _load(options)
    if options.bits is not None and options.target_gb is not None:
        raise InvalidInput("quantize_bits_or_target")
    job = QuantizeJob(
        source=str(installed.resolve(options.SRC, loaded.data_dir)),
        target=os.path.abspath(os.path.expanduser(options.DST)),
        bits=4 if options.bits is None else options.bits,
        group_size=options.group_size,
        embeddings=options.quantization_embeddings,
        target_gb=options.target_gb,
        report=options.report,
        device=loaded.device,
        threads=loaded.threads,
    )
    return run(job, language, options.json)


def plan(options: argparse.Namespace, language: str) -> int:
    """Which part of a model would go where."""
    from glmui.errors import InvalidInput
    from glmui.tools.plan import Wish, run

    held = ("quantize", "head_bits", "kv_cache", "vram_reserve_gb")
    loaded = _load(options, "model", *held, *_MEMORY_SETTINGS)
    if not loaded.model:
        raise InvalidInput("model_not_named")
    return run(Wish(tuple(options.vram), options.ram, options.json), loaded, language)


def models(options: argparse.Namespace, language: str) -> int:
    """What is here and what can be had: get, import, verify, remove, restore."""
    from glmui.tools.models import Wish, ask_here, run

    loaded = _load(options)
    wish = Wish(
        action=options.ACTION,
        what=options.WHAT,
        name=options.name,
        quantize=options.quantize,
        accept_licence=options.accept_licence,
        trust=options.trust,
        now=options.now,
        as_json=options.json,
    )
    return run(wish, loaded, language, ask_here())


_MEMORY_SETTINGS = ("layers_on_gpu", "context")
_MODEL_SETTINGS = ("model", "chatglm_family", "prefix", "adapter", *_MEMORY_SETTINGS)
_COMMON_SETTINGS = ("data_dir", "device", "threads", "log_level")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags that are settings: those of `names`, and those that every command has.

    So many layers on the card means the others on the CPU, unless a device is named.
    """
    given = {name: getattr(options, name) for name in (*names, *_COMMON_SETTINGS)}
    if given.get("layers_on_gpu") is not None and given["device"] is None:
        given["device"] = "mixed"
    return given


def _load(options: argparse.Namespace, *names: str) -> Settings:
    from glmui import settings

    return settings.load(**_given(options, *names))


@dataclass(frozen=True)
class Command:
    flags: tuple[Flag, ...]
    run: Callable[[argparse.Namespace, str], int]


COMMANDS = {
    "serve": Command(SERVE, serve),
    "chat": Command(CHAT, chat),
    "bench": Command(BENCH, bench),
    "models": Command(MODELS, models),
    "doctor": Command(DOCTOR, doctor),
    "quantize": Command(QUANTIZE, quantize),
    "plan": Command(PLAN, plan),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what goes wrong is said in one sentence of the terminal's language."""
    language = i18n.of_terminal()
    _print_anything()
    _keep_to_errors()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "serve"
    options = _parser(name, language).parse_args(arguments)
    try:
        return COMMANDS[name].run(options, language)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.log_level == "debug":
            raise
        return _explain(error, language)


def _explain(error: Exception, language: str) -> int:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("glmui"):
        error = GlmuiError("package_missing", package=error.name)
    elif not isinstance(error, GlmuiError):
        log.error("glmui ended by an error", exc_info=error)
        error = GlmuiError("internal", detail=repr(error))
    print(error.message(language), file=sys.stderr)
    return error.exit_code


def _print_anything() -> None:
    """A terminal that cannot show a character gets a question mark, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="replace")


def _keep_to_errors() -> None:
    """A command that keeps no log file shows what it logs on the terminal: errors alone belong there."""
    if logging.lastResort:
        logging.lastResort.setLevel(logging.ERROR)


def _parser(name: str, language: str) -> argparse.ArgumentParser:
    def say(key: str, **values: Any) -> str:
        return i18n.text(language, f"cli.{key}", **values)

    commands = "\n".join(f"  {one:<8} {say(f'{one}.about')}" for one in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="glmui" if name == "serve" else f"glmui {name}",
        description=say(f"{name}.about"),
        epilog=say("commands", commands=commands) if name == "serve" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    flags = parser.add_argument_group(say("flags_title"))
    for flag, details in COMMANDS[name].flags:
        flags.add_argument(flag, help=say(f"flags.{flag.removeprefix('--')}"), **details)
    flags.add_argument(
        "--version", action="version", version=f"glmui {__version__}", help=say("flags.version")
    )
    flags.add_argument("-h", "--help", action="help", help=say("flags.help"))
    return parser
