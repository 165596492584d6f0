"""The sweep: `python tests/sweep/run.py`, one architecture after the other; docs/reference/models.md says what for.

Results so far are kept in a JSON file, so that an interrupted sweep goes on and one architecture can be run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "tests")

from support.stages import free_ports  # noqa: E402
from sweep import forks, report  # noqa: E402
from sweep.engines import compare, run_head, run_reference, run_stage  # noqa: E402
from sweep.recipes import Recipe, recipe_for  # noqa: E402
from sweep.report import Row  # noqa: E402

CHECKPOINT_TIMEOUT_S = 120.0
REFERENCE_TIMEOUT_S = 240.0
RING_TIMEOUT_S = 300.0
MIN_DISTINCT = 10
# For models that the registry does not name.
_BACKENDS = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
DEFAULT_RESULTS = ROOT / ".demo" / "sweep.json"


def main() -> None:
    options = _parse(sys.argv[1:])
    _restart_with_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended on the way out
    forks.become_parent()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = _read(options.results)
    declared = _declared(None if options.page else options.only)
    names = options.only or [name for name in declared if name not in results or options.again]
    unknown = sorted(set(names) - set(declared))
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no text-generation architecture of this vLLM that declares pipeline support")
    for number, name in enumerate(names, 1):
        row = _run(name, options.keep)
        results[name] = row
        _write(options.results, results)
        print(f"{number}/{len(names)} {name}: {row.status} {row.detail[:300]} ({row.seconds:.0f} s)", flush=True)
    if options.page:
        options.page.write_text(report.render(declared, results, _versions()))
    sys.exit(any(results[name].status == report.WRONG for name in names))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, whatever is known of them")
    parser.add_argument("--again", action="store_true", help="all of them, whatever is known")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="write this page from all results (docs/reference/models.md)")
    parser.add_argument("--keep", type=Path, help="keep checkpoints and logs in this folder")
    return parser.parse_args(arguments)


def _restart_with_environment() -> None:
    """What numpy, OpenMP and vLLM read while they are imported has to be there before Python starts."""
    if all(os.environ.get(name) == value for name, value in forks.ENVIRONMENT.items()):
        return
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **forks.ENVIRONMENT})


def _versions() -> str:
    import torch
    import transformers

    import vllm

    return f"vLLM {vllm.__version__}, torch {torch.__version__} and transformers {transformers.__version__}"


def _read(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text())["rows"].items()}


def _write(path: Path, results: dict[str, Row]) -> None:
    text = json.dumps({"rows": {name: row.as_json() for name, row in sorted(results.items())}}, indent=1)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(text)
    partial_path.replace(path)


# ---- the list --------------------------------------------------------------------------------------------------------


def _declared(only: Sequence[str] | None) -> list[str]:
    """The registry's architectures, or those of ``only``, that generate text, declare pipeline support and take no
    images or audio.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        child = _one("registry", partial(_read_registry, only), Path(folder), REFERENCE_TIMEOUT_S)
        if child.result is None:
            sys.exit(f"the registry cannot be read: {child.error}\n{child.text()[-3000:]}")
        return list(child.result)


def _read_registry(only: Sequence[str] | None) -> list[str]:
    from vllm.model_executor.models import registry

    def inspect_here(inspect: Callable[[], Any]) -> Any:
        return inspect()

    # vLLM starts a process to inspect a model that it has not cached. This one is a child already.
    registry._run_in_subprocess = inspect_here
    named = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    found = []
    for name in sorted({*named, *_BACKENDS} if only is None else only):
        if name not in registry.ModelRegistry.models:
            continue
        try:
            info = registry.ModelRegistry.models[name].inspect_model_cls()
        except ImportError as error:
            print(f"{name} cannot be imported: {error}")  # those with images, where torchvision is not installed
            continue
        if _is_meant(info):
            found.append(name)
    return found


def _is_meant(info: Any) -> bool:
    return bool(info.is_text_generation_model and info.supports_pp and not info.supports_multimodal)


# ---- one architecture ------------------------------------------------------------------------------------------------


def _run(name: str, keep: Path | None) -> Row:
    began_at = time.monotonic()
    recipe = recipe_for(name)
    if recipe is None or recipe.impossible:
        reason = recipe.impossible if recipe else "nobody has written a recipe"
        return Row(name, report.NOT_MADE, recipe.says if recipe else "", detail=reason)
    folder = keep / name if keep else Path(tempfile.mkdtemp(prefix="sweep-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _compare_engines(recipe, folder)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return Row(name, says=recipe.says, ranges=list(recipe.ranges), seconds=time.monotonic() - began_at, **outcome)


def _compare_engines(recipe: Recipe, folder: Path) -> dict[str, Any]:
    model = folder / "model"
    made = _one("checkpoint", partial(_make, recipe, model), folder, CHECKPOINT_TIMEOUT_S)
    if made.result is None and recipe.weights == "transformers":
        return {"status": report.NOT_MADE, "detail": made.error}
    if made.result is None:  # vLLM cannot build the model
        return {"status": report.FAILS_IN_STOCK, "detail": made.error}
    stock = _one("stock", partial(run_reference, recipe, model), folder, REFERENCE_TIMEOUT_S)
    if stock.result is None:
        return {"status": report.FAILS_IN_STOCK, "detail": stock.error}
    distinct = len({token for answer in stock.result["together"] for token in answer})
    if distinct < MIN_DISTINCT:
        detail = f"{distinct} different ids of 40: these random weights prove nothing"
        return {"status": report.WRONG, "detail": detail, "distinct": distinct}
    return {"distinct": distinct, **_run_ring(recipe, folder, stock.result)}


def _make(recipe: Recipe, model: Path) -> int:
    from sweep.checkpoints import make_checkpoint

    return make_checkpoint(recipe, model)


def _one(name: str, function: Any, folder: Path, timeout_s: float) -> forks.Child:
    child = forks.fork(name, function, folder)
    forks.wait([child], timeout_s)
    return child


def _run_ring(recipe: Recipe, folder: Path, stock: dict[str, list[list[int]]]) -> dict[str, Any]:
    model, ports = folder / "model", free_ports(len(recipe.ranges))
    head = forks.fork("head", partial(run_head, recipe, model, ports), folder)
    workers = [
        forks.fork(f"stage{stage}", partial(run_stage, recipe, model, ports, stage), folder)
        for stage in range(1, len(recipe.ranges))
    ]
    forks.wait([head, *workers], RING_TIMEOUT_S)
    if head.result is None:
        return _describe_failure([head, *workers])
    between = head.result["between"]
    # Alone there is nothing that two schedulers could batch differently: no ties.
    references = {
        "together": [stock["together"], *stock.values()],
        "again": [stock["again"], *stock.values()],
        "alone": [stock["alone"]],
    }
    found = {how: compare(head.result[how], expected) for how, expected in references.items()}
    wrong = [f"{how}, {text}" for how, comparison in found.items() for text in comparison.wrong]
    wrong += [f"{worker.name} ended with {worker.exit_code}" for worker in workers if worker.exit_code]
    if wrong:
        return {"status": report.WRONG, "detail": "; ".join(wrong), "between": between}
    return {"status": report.WORKS, "between": between, "ties": max(each.ties for each in found.values())}


def _describe_failure(children: Sequence[forks.Child]) -> dict[str, Any]:
    """A refusal is a line of a stage that has a reason (exit code 2); everything else is a bug of ours."""
    refused = [child for child in children if child.exit_code == 2 or "ConfigError" in child.error]
    if refused:
        said = [line for line in refused[0].text().splitlines() if line.startswith("Stage ")]
        return {"status": report.REFUSED, "detail": said[-1] if said else refused[0].error}
    errors = [f"{child.name}: {child.error} ({_last_error(child)})" for child in children if child.error]
    return {"status": report.WRONG, "detail": "; ".join(errors)}


def _last_error(child: forks.Child) -> str:
    lines = [line for line in child.text().splitlines() if "Error" in line]
    return lines[-1][-300:] if lines else ""


if __name__ == "__main__":
    main()
