"""The ``cute-infer`` command.

    cute-infer show-config [--json]                     what is installed, which devices, where kernels are kept
    cute-infer demo                                     the quick start on whatever is here
    cute-infer compile --model llama3-8b --arch sm_90a  fill the cache, or with --out build a bundle
    cute-infer bench decode|prefill|sampling|append|startup  against peers, in a checkout of the repository
    cute-infer cache list | verify | clear

Exit status: 0 done, 1 refused (the message says why), 2 wrong usage.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import ConfigError, CuteInferError, fail

if TYPE_CHECKING:
    from .jit import Request, Target
    from .jit.cache import Entry


def main() -> None:
    """Entry point: runs the command and turns our errors into exit status 1."""
    try:
        cli(prog_name="cute-infer")
    except CuteInferError as error:
        click.echo(f"cute-infer: {error}", err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cute-infer")
def cli() -> None:
    """LLM serving kernels written in Python with NVIDIA's CuTe DSL."""


# ------------------------------------------------------------------------------------------------------------------ show-config
@cli.command("show-config")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_config(as_json: bool) -> None:
    """Versions, devices, target, backends, cache and environment."""
    facts = collect_config()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        click.echo(f"{section}:")
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
            click.echo(f"  {name:<14} {'-' if shown is None else shown}")


def collect_config() -> dict[str, Any]:
    """Everything a bug report needs, as JSON data."""
    import torch

    from .config import VARIABLES, get_config
    from .jit import disk_cache, kernel_sources_hash
    from .jit.toolchain import driver_cuda_major, runtime_library, toolchain

    config, cache, tools = get_config(), disk_cache(), toolchain()
    compiler = f"nvidia-cutlass-dsl {tools['dsl']} ({tools['flavour']})" if tools["dsl"] else None
    devices = [_device(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "cute_infer": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "compiler": compiler,
            "tvm-ffi": tools["tvm_ffi"],
            "driver CUDA": driver_cuda_major(),
            "kernels": kernel_sources_hash()[:16],
        },
        "devices": devices,
        "target": {"arch": config.arch or (devices[0]["code"] if devices else None)},
        "backends": {
            "kernels": _kernels(bool(devices), bool(compiler or config.bundle)),
            "reference": "available",
            "default": config.backend,
        },
        "cache": {
            "path": str(cache.root),
            "trusted": cache.trusted(),
            "writable": cache.writable(),
            "kernels": len(cache.keys()),
            "bytes": cache.size(),
            "bundles": [str(path) for path in config.bundle] or None,
            "runtime": str(runtime_library() or "") or None,
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _kernels(device: bool, source: bool) -> str:
    if not device:
        return "no CUDA device"
    return "available" if source else "neither a compiler nor a bundle"


def _device(index: int) -> dict[str, Any]:
    import torch

    from .jit import Target

    properties = torch.cuda.get_device_properties(index)
    try:
        code = Target.parse(f"{properties.major}.{properties.minor}").arch
    except CuteInferError:
        code = "unsupported"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "code": code,
        "SMs": properties.multi_processor_count,
        "GiB": round(properties.total_memory / 2**30, 1),
    }


# ------------------------------------------------------------------------------------------------------------------ demo
@cli.command()
def demo() -> None:
    """Run the quick start on the GPU, or on the CPU with the reference backend."""
    from .demo import main as run

    run()


# ------------------------------------------------------------------------------------------------------------------ compile
@cli.command("compile")
@click.option("--model", "models", multiple=True, help="A preset of cute_infer.zoo; may be repeated.")
@click.option(
    "--transformers",
    "configs",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="config.json (or its folder) of a model that runs under Hugging Face transformers; may be repeated.",
)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), help="In which a --transformers model runs. Default: its config's.")
@click.option("--variant", "texts", multiple=True, metavar="JSON", help="One kernel, as a MissingKernelError prints it; may be repeated.")
@click.option("--arch", "archs", multiple=True, help="sm_80, sm_90a, ...; may be repeated. Default: this machine's device.")
@click.option("--page-size", "page_sizes", multiple=True, type=click.IntRange(1), help="Tokens per KV page; may be repeated. Default: 16.")
@click.option(
    "--kv-dtype", "kv_dtypes", multiple=True, help="KV cache dtype, such as float8_e4m3fn; may be repeated. Default: the model's."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write a bundle here as well.")
@click.option("--jobs", type=click.IntRange(1), default=max(1, min(8, os.cpu_count() or 1)), show_default=True, help="Processes.")
@click.option("--list", "only_list", is_flag=True, help="Print what would be compiled.")
def compile_command(
    models: tuple[str, ...],
    configs: tuple[Path, ...],
    dtype: str | None,
    texts: tuple[str, ...],
    archs: tuple[str, ...],
    page_sizes: tuple[int, ...],
    kv_dtypes: tuple[str, ...],
    out: Path | None,
    jobs: int,
    only_list: bool,
) -> None:
    """Compile kernels ahead of time. Needs no GPU."""
    if not models and not configs and not texts:
        raise click.UsageError("name what to compile: --model, --transformers or --variant")
    found = dict.fromkeys(_given(texts))
    if models or configs:
        for target in _targets(archs):
            found.update(dict.fromkeys(_presets(models, target, page_sizes or (16,), kv_dtypes)))
            found.update(dict.fromkeys(_under_transformers(configs, target, dtype)))
    requests = list(found)
    if only_list:
        for request in requests:
            click.echo(f"{request.arch} {request.path} {request.spec} {request.tile}")
        return
    started = time.perf_counter()
    entries = compile_all(requests, jobs)
    click.echo(f"{len(entries)} kernels ready in {time.perf_counter() - started:.1f} s")
    if out is not None:
        from .jit.bundle import write_bundle

        for library in write_bundle(out, entries)["libraries"].values():
            click.echo(f"{out / library['file']}  {library['bytes']} bytes  sha256 {library['sha256']}")
        click.echo(f"use it with CUTE_INFER_BUNDLE={out.absolute()}")


def _given(texts: tuple[str, ...]) -> Iterator[Request]:
    """The requests that --variant spells out."""
    from .jit import Request

    for text in texts:
        try:
            yield Request.from_data(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise click.BadParameter(f"not a kernel description: {error!r}", param_hint="--variant") from error


def _presets(models: tuple[str, ...], target: Target, page_sizes: tuple[int, ...], kv_dtypes: tuple[str, ...]) -> Iterator[Request]:
    from . import zoo

    for name in models:
        if name not in zoo.MODELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(zoo.MODELS)}", param_hint="--model")
        for kv_dtype in kv_dtypes or (None,):
            yield from zoo.variants(zoo.MODELS[name], target, page_sizes, kv_dtype)


def _under_transformers(configs: tuple[Path, ...], target: Target, dtype: str | None) -> Iterator[Request]:
    from .zoo import transformers_variants

    for path in configs:
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{file}: {error}", param_hint="--transformers") from error
        yield from transformers_variants(config, target, dtype)


def _targets(archs: tuple[str, ...]) -> list[Target]:
    from .config import get_config
    from .jit import Target

    named = archs or tuple(filter(None, [get_config().arch]))
    return [Target.parse(arch) for arch in named] if named else [Target.detect()]


def compile_all(requests: list[Request], jobs: int) -> list[Entry]:
    """Compile ``requests`` in up to ``jobs`` GPU-blind processes; entries that the disk cache already has are read from it.

    Raises:
        CuteInferError: of the first request that failed; the others are finished and kept.
    """
    spawn = multiprocessing.get_context("spawn")  # the compiler must not run in a fork of a process that has used it
    with _counter(len(requests)) as advance:
        with concurrent.futures.ProcessPoolExecutor(min(jobs, len(requests)) or 1, spawn, initializer=_hide_gpus) as pool:
            futures = [pool.submit(_compile_one, request) for request in requests]
            for future in concurrent.futures.as_completed(futures):
                failed = future.exception()
                advance(f"failed: {failed}" if failed else _line(future.result()))
    return [future.result() for future in futures]


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["CUTE_INFER_PROGRESS"] = "off"


def _compile_one(request: Request) -> Entry:
    from .jit import get_entry

    return get_entry(request)


def _line(entry: Entry) -> str:
    return f"{entry.symbol.rpartition('_')[0].removeprefix('cute_infer_')} {entry.facts}"


@contextlib.contextmanager
def _counter(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, else one line per kernel; yields what to call after each."""
    if not sys.stderr.isatty():
        done = 0

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            click.echo(f"[{done}/{total}] {text}", err=True)

        yield advance
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda text: bar.update(task, advance=1, description=text[:60])


# ------------------------------------------------------------------------------------------------------------------ bench
@cli.command("bench", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure against peers: decode, prefill, sampling, append, startup, all; or draw the plots."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        fail(
            ConfigError,
            "bench: the benchmarks belong to the repository and are not part of an installed package",
            got=f"cute_infer from {checkout}",
            fix="clone the repository at this version, `pip install -e '.[bench]'` in it, then `cute-infer bench` again",
        )
    sys.path.insert(0, str(checkout))
    run = importlib.import_module("benchmarks.__main__").main
    run(args=list(arguments), prog_name="cute-infer bench")


# ------------------------------------------------------------------------------------------------------------------ cache
@cli.group()
def cache() -> None:
    """The kernels kept on disk."""


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def cache_list(as_json: bool) -> None:
    """Print every kernel with what it was compiled from."""
    from .jit import disk_cache
    from .jit.cache import describe

    entries = {key: entry for key in disk_cache().keys() if (entry := disk_cache().load(key))}
    if as_json:
        rows = [{"key": key, "request": e.request, "toolchain": e.toolchain, "facts": e.facts.to_data()} for key, e in entries.items()]
        click.echo(json.dumps(rows, indent=2))
        return
    for key, entry in entries.items():
        click.echo(f"{key[:12]}  {len(entry.object):>8}  {describe(entry.request)}")
    click.echo(f"{len(entries)} kernels, {disk_cache().size()} bytes, in {disk_cache().root}")


@cache.command("verify")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.pass_context
def cache_verify(context: click.Context, as_json: bool) -> None:
    """Check every kernel against its recorded SHA-256, owner and mode; exit status 1 when one fails."""
    from .jit import disk_cache

    result = disk_cache().verify()
    bad = {key: reason for key, reason in result.items() if reason}
    if as_json:
        click.echo(json.dumps({"checked": len(result), "bad": bad}, indent=2))
    else:
        for key, reason in bad.items():
            click.echo(f"{key}: {reason}")
        click.echo(f"{len(result)} checked, {len(bad)} bad")
    if bad:
        context.exit(1)


@cache.command("clear")
def cache_clear() -> None:
    """Remove every kernel."""
    from .jit import disk_cache

    click.echo(f"{disk_cache().clear()} kernels removed from {disk_cache().root}")
