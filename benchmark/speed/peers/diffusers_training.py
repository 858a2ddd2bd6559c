"""diffusers' example scripts (Custom Diffusion, DreamBooth LoRA) from a checkout, one training step at a time.

The script's own `main` runs in a thread. It is handed an `Accelerator` that stops it where a step begins, and nothing
else of it is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

with contextlib.suppress(ImportError):  # mends what the libraries trip over in some environments; no part of theirs
    import dualcl.benchmark.core.compat  # noqa: F401

import accelerate
import diffusers
import peft
import transformers
from accelerate import Accelerator

VERSIONS = {m.__name__: m.__version__ for m in (diffusers, transformers, accelerate, peft)}
SCRIPTS = {
    "custom_diffusion": "examples/custom_diffusion/train_custom_diffusion.py",
    "dreambooth_lora": "examples/dreambooth/train_dreambooth_lora.py",
}


def load_script(path: Path) -> ModuleType:
    """The script as a module. Raises FileNotFoundError, or the ImportError of the script."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a checkout of diffusers")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Stepper:
    """Runs `work` in a thread up to the next call of `pause`, and from there on again."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._at: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._work()
            raise RuntimeError("the script has ended")
        except BaseException as error:  # SystemExit too: the script is over either way
            self._at.put(error)

    def pause(self) -> None:
        """Called by `work`: waits for the next `step`."""
        self._at.put(None)
        self._go.get()

    def step(self) -> None:
        """Goes on to the next pause; raises what `work` raises."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.put(None)
        error = self._at.get()
        if error is not None:
            raise error


def arguments(setup: dict[str, Any], out: str) -> list[str]:
    """The script's command line."""
    words = [
        f"--pretrained_model_name_or_path={setup['model']}",
        f"--instance_data_dir={setup['concept']}",
        f"--output_dir={out}",
        f"--resolution={setup['resolution']}",
        f"--train_batch_size={setup['batch']}",
        "--max_train_steps=1000000",
        "--checkpointing_steps=1000000",
        "--lr_warmup_steps=0",
        "--dataloader_num_workers=0",
        "--seed=0",
    ]
    if setup["precision"] != "fp32":
        words.append(f"--mixed_precision={setup['precision']}")
    if setup["gradient_checkpointing"]:
        words.append("--gradient_checkpointing")
    if setup["script"] == "dreambooth_lora":
        return [*words, "--instance_prompt=a photo of a circle", f"--rank={setup['rank']}"]
    return [
        *words,
        "--instance_prompt=a photo of <new1>",
        "--modifier_token=<new1>",
        "--initializer_token=symbol",
        "--with_prior_preservation",
        f"--class_data_dir={setup['class']}",
        "--class_prompt=a photo of a symbol",
        f"--num_class_images={len(list(Path(setup['class']).iterdir()))}",
        "--noaug",
    ]


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], int]]:
    """step: one pass through the script's loop, the fetching of the next batch included.

    Raises FileNotFoundError where `checkout` lacks the script, ImportError for a version of diffusers it refuses.
    """
    if not setup["device"].startswith("cuda"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    script = load_script(Path(setup["checkout"]) / SCRIPTS[setup["script"]])
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    parsed = script.parse_args(arguments(setup, folder.name))
    images = setup["batch"] * (2 if parsed.with_prior_preservation else 1)

    class Paused(Accelerator):
        """Waits where a step begins, and logs to no tracker."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "log_with": None})
            self._model: Any = None

        def accumulate(self, *models: Any) -> Any:
            # a step of Custom Diffusion enters twice, with another model each time
            self._model = self._model or models[0]
            if models[0] is self._model:
                stepper.pause()
            return super().accumulate(*models)

    # the data set of one reads the command line's `args`
    vars(script).update(Accelerator=Paused, args=parsed)
    stepper = Stepper(lambda: script.main(parsed))
    stepper.step()

    def step() -> int:
        stepper.step()
        return images

    return {"step": step}
