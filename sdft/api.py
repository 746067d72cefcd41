"""The Python API: compose a config, fine-tune, load, sample, merge and compare, each in one call.

The functions do what the commands do, and raise `UserError` with their messages. They print nothing by default, and
leave signal handlers, torch's settings, random states and Hydra as they found them.
"""

from __future__ import annotations

import copy
import json
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import sdft.config.command as config
from sdft.config.trust import line_of_key, read_yaml, refuse_untrusted, refuse_untrusted_overrides, trusted_by
from sdft.distributed.processes import ProcessInfo
from sdft.distributed.run_lock import run_lock
from sdft.errors import UserError
from sdft.evaluation.run import CompareResult, find_device
from sdft.evaluation.run import compare as run_comparison
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import AdapterFiles, read_subjects
from sdft.merging.run import MergeResult
from sdft.merging.run import merge as run_merge
from sdft.progress import no_progress_bars
from sdft.protocols import DiffusionModel
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.training import receipt
from sdft.training.run import FinetuneResult, num_devices
from sdft.training.run import finetune as run_training
from sdft.types import Precision

__all__ = ["CompareResult", "FinetuneResult", "MergeResult", "compare", "compose", "finetune", "load_model", "merge",
           "sample"]  # fmt: skip


def compose(root: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()) -> DictConfig:
    """The config of a command (`train`, `eval`, `merge` ...), as its command line with these overrides composes it.

    config_dirs: folders of your own that add options to any group, as `--config-dir` does.

    Interpolations stay, so that a value that is changed afterwards changes all that refers to it.
    Raises ConfigError, a UserError, for anything misspelt, misplaced or missing.
    """
    with _hydra_restored():
        return config.compose(root, overrides, config_dirs=config_dirs)


def finetune(cfg: DictConfig | Sequence[str] = (), *, verbose: bool = False, progress: bool = False) -> FinetuneResult:
    """Fine-tune a model on one device; the same as `python train.py OVERRIDES`.

    cfg: overrides, or a config of `compose("train", ...)`, which is checked again. With overrides, metrics are logged
        to metrics.csv only, unless `logger=` chooses otherwise.
    verbose: print what the command prints. progress: show progress bars.

    Raises UserError for a config or data that cannot work, and for more than one device: use the command for these.
    """
    cfg, overrides = _training_config(cfg)
    if cfg.trainer.devices == "auto" and ProcessInfo.current().world_size == 1:
        cfg.trainer.devices = 1  # processes that Lightning starts would run the caller's script again
    if num_devices(cfg.trainer) > ProcessInfo.current().world_size:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}, trainer.num_nodes={cfg.trainer.num_nodes}: finetune runs in one "
            "process; for several, use the command sdft-train, or python -m sdft.training"
        )
    with _quiet(progress), _state_restored():
        config.check(cfg)
        if cfg.dry_run:
            raise UserError("dry_run=true: nothing to return; use sdft-train dry_run=true")
        cfg.run_dir = str(Path(cfg.run_dir).expanduser().absolute())
        folder = Path(cfg.run_dir) / ".hydra"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with run_lock(folder.parent):
                OmegaConf.save(cfg, folder / "config.yaml")
                OmegaConf.save(OmegaConf.create(overrides or []), folder / "overrides.yaml")
                result = run_training(cfg, overrides, _reporter(verbose))
        except SystemExit as stop:
            # Lightning exits with 1 after Ctrl-C, and the preemption callback with 130.
            if stop.code in (1, 130):
                raise KeyboardInterrupt from None
            raise UserError(f"stopped early by a signal; resume=auto run_dir={cfg.run_dir} continues") from None
    assert result is not None, "one process"
    return result


def load_model(
    model: str | Path = "nano",
    *,
    lora: str | Path | None = None,
    scale: float = 1.0,
    words: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
) -> DiffusionModel:
    """A model to sample from.

    model: `nano`, a hub id, a diffusers folder, a single-file checkpoint, or a run folder of `finetune`.
    lora: a LoRA file or a run folder. scale: its strength; 0.0 is without it.
    words: a words.safetensors, if `lora` is a file; a run folder has them with it.
    device: by default the first GPU, otherwise the CPU.
    dtype: `fp32`, `bf16` or `fp16` weights of the UNet and the text encoders; by default fp32.
    overrides: of `conf/model`, such as `model.attention=sliced`.
    """
    source, chosen = str(model), str(model)
    if (recorded := Path(source).expanduser() / ".hydra" / "config.yaml").is_file():
        model_node = dict((read_yaml(recorded) or {}).get("model") or {})
        weights = {"model": {"weights": model_node.get("weights")}}
        refuse_untrusted(weights, str(recorded), line_of=partial(line_of_key, recorded))
        chosen = str(model_node.get("weights"))
    chosen_options = [f"model={'nano' if chosen == 'nano' else 'sdxl'}", f"model.weights={_value(chosen)}"]
    if dtype is not None:
        parts_given = ("unet", "text_encoder", "text_encoder_2")
        chosen_options += [f"+model.dtype.{part}={_value(dtype)}" for part in parts_given]
    cfg = compose("eval", [*chosen_options, "model.gradient_checkpointing=false", *overrides, "subjects={model: nano}"])
    config.check(cfg)
    parts: list[Any] = [source]
    if lora is not None:
        parts.append({"lora": str(lora), "scale": scale})
    with _quiet(progress=False), ExitStack() as stack:
        try:
            (subject,) = read_subjects({"model": parts if len(parts) > 1 else source})
            if words is not None:
                subject = replace(subject, adapters=(*subject.adapters, AdapterFiles(words=Path(words).expanduser())))
            loader = SubjectLoader(config.build(cfg.model), chosen, torch.device(device or find_device()))
            loaded = stack.enter_context(loader.open(subject))
        except UserError as error:
            raise UserError(str(error).replace("subjects.model", "load_model")) from None
        # The adapters come off when the stack closes: the model keeps it, so that they stay.
        object.__setattr__(loaded, "applied", stack.pop_all())
    return loaded


def sample(
    model: DiffusionModel,
    prompts: Sequence[str] | str,
    *,
    seed: int = 0,
    steps: int = 25,
    cfg: float = 5.0,
    sampler: str | Sampler = "euler",
    size: int | tuple[int, int] = 128,
    negative: str = "",
    rescale: float = 0.0,
    batch_size: int = 8,
    precision: Precision | None = None,
    progress: bool = False,
) -> list[Image.Image]:
    """Images of the prompts; image i starts from the noise of `seed + i`.

    steps, cfg, sampler, negative, rescale: see `sdft.sampling.samplers.Sampler`; one that is given as `sampler` has
        these itself. size: side in pixels, or (height, width); SDXL needs 1024.
    precision: of autocast; by default bf16 on a GPU and fp32 on the CPU.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    if isinstance(sampler, str):
        sampler = _sampler(sampler, steps, cfg, negative, rescale, batch_size)
    size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
    precision = precision or ("bf16" if model.device.type == "cuda" else "fp32")
    with _quiet(progress):
        seeds = range(seed, seed + len(prompts))
        images = generate(model, prompts, seeds, sampler, size_hw, precision, "sampling" if progress else None)
    return [Image.fromarray(image) for image in images]


def merge(method: str, *, verbose: bool = False, progress: bool = False, **settings: Any) -> MergeResult:
    """Merge models or LoRAs; the same as `python -m sdft.merging merge=METHOD key=value ...`.

    method: an option of `merge=`, such as weighted_sum, ties or lora_sum; `recipe` reads `file=`.
    settings: what the command takes: the inputs and numbers of the method, out, to, dtype, threads, overwrite, dry_run.
    """
    cfg = compose("merge", [f"merge={method}", *(f"{key}={_value(value)}" for key, value in settings.items())])
    with _quiet(progress), _state_restored():
        config.check(cfg)
        return run_merge(cfg, _reporter(verbose))


def compare(
    subjects: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    verbose: bool = False,
    progress: bool = False,
    **settings: Any,
) -> CompareResult:
    """Compare what models draw; the same as `python eval.py subjects={...} key=value ...`.

    subjects: name -> `nano`, a hub id, a folder, a checkpoint, a run folder, a LoRA file, a dict with `lora` and
        `scale`, or a list of these. None if `sweep=` names the folder of a sweep.
    overrides: of groups and single keys, as in `["model=sdxl", "sampler.steps=30"]`.
    settings: top-level keys of `conf/eval.yaml`: prompts, seeds, size, reference, judge, run_dir, ...
    """
    given = {**({} if subjects is None else {"subjects": subjects}), **settings}
    cfg = compose("eval", [*overrides, *(f"{key}={_value(value)}" for key, value in given.items())])
    with _quiet(progress), _state_restored():
        config.check(cfg)
        folder = Path(cfg.run_dir).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        cfg.run_dir = str(folder)
        with run_lock(folder):
            result = run_comparison(cfg, _reporter(verbose))
    if result is None:
        raise UserError("compare runs in one process; for several, use the command sdft-eval")
    return result


@lru_cache(maxsize=32)
def _sampler(*settings: Any) -> Sampler:
    """A sampler whose arguments are checked as those of a config are."""
    keys = ("name", "steps", "cfg", "negative", "rescale", "batch_size")
    node = {"_target_": "sdft.sampling.samplers.Sampler", **dict(zip(keys, settings, strict=True))}
    cfg = OmegaConf.create({"sampler": node})
    config.check(cfg)
    return config.build(cfg.sampler)


def _training_config(given: DictConfig | Sequence[str]) -> tuple[DictConfig, list[str] | None]:
    """The config of a run, and its overrides if they are known."""
    if isinstance(given, DictConfig):
        cfg = copy.deepcopy(given)
        OmegaConf.clear_cache(cfg)  # `${now:}` is the time of this run
        return cfg, None
    words = [given] if isinstance(given, str) else list(given)
    named = dict(word.split("=", 1) for word in words if "=" in word)
    file = named.pop("reproduce", None)
    if file not in (None, "null") and (recorded := receipt.read(str(file)))["overrides"] is None:
        old = recorded["config"]
        run_dir = named.pop("run_dir", None) or str(compose("train", [f"name={_value(old['name'])}"]).run_dir)
        named.pop("trust", None)
        if named:
            raise UserError(f"reproduce={file}: goes with run_dir only, not with {', '.join(named)}")
        refuse_untrusted(old, f"reproduce={file}", trusted_by(words))
        text = json.dumps(old).replace(json.dumps(old["run_dir"])[1:-1], json.dumps(run_dir)[1:-1])
        return OmegaConf.create(json.loads(text) | {"reproduce": str(file)}), None
    given_words, words = words, receipt.recalled(words)
    recorded_words = words[: len(words) - len(given_words)]
    if path := receipt.file_in(given_words):
        refuse_untrusted_overrides(recorded_words, path, trusted_by(given_words))
    if not any(re.match(r"~?logger\b", word) for word in words):
        words = ["logger=csv", *words]
    return compose("train", words), words


def _value(value: Any) -> str:
    """A Python value as the value of an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str | Path):
        # Hydra reads a backslash as such, except before a quote.
        escaped = re.sub(r"(\\*)(?='|$)", r"\1\1", str(value)).replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


def _reporter(verbose: bool) -> Callable[[str], Any]:
    return partial(print, flush=True) if verbose else lambda line: None


def _quiet(progress: bool) -> Any:
    return no_progress_bars(hidden=not progress)


@contextmanager
def _hydra_restored() -> Iterator[None]:
    """A caller may have initialized Hydra, which can be initialized once."""
    instance = GlobalHydra.instance()
    theirs, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        GlobalHydra.set_instance(instance)
        instance.hydra = theirs


@contextmanager
def _state_restored() -> Iterator[None]:
    """Signal handlers, and torch's threads, attention kernels and random states, as they were before."""
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in signals} if main else {}
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
