"""What may be asked for: attention configs, prewarm requests and the settings of a runtime.

This module imports nothing else of the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, SupportsIndex

import platformdirs
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from pydantic import ValidationInfo
    from typing_extensions import Self

EngineName = Literal["auto", "flex", "blocked", "dense", "eager"]
DtypeName = Literal["float32", "bfloat16", "float16"]
SLIDING = "sliding_attention"
FULL = "full_attention"
# Kernels compute in float32, which must hold the number, its inverse, and small multiples of both.
RANGE = "a number from 1e-37 to 1e+37"
# The longest sequence to prewarm for: 16 million tokens, whose mask still takes less than a second.
LONGEST = 2**24


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a bool")
    return value


def _fits(value: float) -> bool:
    # Literals: a float of the module is a symbol to dynamo, see ``checks.constant_in_graph``.
    return 1e-37 <= value <= 1e37


def _in_range(value: float) -> float:
    if not _fits(value):
        raise ValueError(f"expected {RANGE}")
    return value


def check_positive(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless ``value`` is None or within RANGE."""
    is_number = not isinstance(value, bool)
    try:
        fits = value is None or _fits(value)
    except TypeError:
        is_number = fits = False
    if not (is_number and fits):
        wrong = ValueError if is_number else TypeError
        raise wrong(f"{name}: {value!r}, expected {RANGE}")


def _divides_heads(value: int, info: ValidationInfo) -> int:
    heads = info.data.get("num_heads", value)  # absent if it is wrong itself
    if heads % value:
        raise ValueError(f"expected a divisor of num_heads, which is {heads}")
    return value


def checked_count(name: str, value: Any, remedy: str = "") -> int:
    """``value`` as an int. Raises TypeError or ValueError unless it is an integer of at least 1."""
    if not _is_integer(value) or value < 1:
        wrong = ValueError if _is_integer(value) else TypeError
        raise wrong(f"{name}: {value!r}, expected an integer of at least 1{remedy}")
    return int(value)


def _torch_name(value: Any) -> Any:
    """``torch.float32`` and ``torch.device("cpu")`` as strings, which is what a request keeps."""
    if f"{type(value).__module__}.{type(value).__name__}" in ("torch.dtype", "torch.device"):
        return str(value).removeprefix("torch.")
    return value


def _not_empty(value: Any) -> Any:
    if value == "":  # as a Path it would be the current folder
        raise ValueError("expected a path, not an empty one")
    if "\0" in str(value):
        raise ValueError("expected a path, which holds no null byte")
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("expected a path whose ~ is a user's home folder") from None


PositiveNumber = Annotated[float, BeforeValidator(_no_bool), AfterValidator(_in_range)]
PositiveInt = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Length = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=LONGEST)]
UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_expanded)]


@contextmanager
def _one_line_errors(model: type[BaseModel], given: Mapping[str, Any]) -> Iterator[None]:
    """Turn pydantic's report into one line: the field or environment variable, its value, what was expected."""
    try:
        yield
    except ValidationError as error:
        parts = []
        for item in error.errors(include_url=False):
            field = ".".join(map(str, item["loc"])) or model.__name__
            if issubclass(model, BaseSettings) and field not in given:
                field = f"environment variable {_variable(field)}"
            value = "" if item["type"] == "missing" else f" (got {item['input']!r})"
            said = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                said = f"unknown; the closest known field is {_closest(field, model.model_fields)}"
            parts.append(f"{field}: {said}{value}")
        raise ValueError(f"{model.__name__}: " + "; ".join(parts)) from None


def _closest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # an import of 2 ms

    return get_close_matches(name, sorted(known), 1, cutoff=0)[0]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Another one with some fields changed; checked, as pydantic's own copy is not."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **(update or {})})

    if not TYPE_CHECKING:  # a type checker refuses it by itself

        def __setattr__(self, name: str, value: Any) -> None:
            model = type(self).__name__
            raise ValueError(f"{model}.{name}: {model} is frozen, cannot set {value!r}; build a new {model}(...)")


class AttentionConfig(_Frozen):
    """One kind of attention layer; frozen and hashable.

    ``softcap``: bound of the logits, ``softcap * tanh(logits / softcap)``; None for no cap.
    ``scale``: factor on ``q @ k.T`` before the cap (Gemma-2: ``query_pre_attn_scalar ** -0.5``).
    ``window``: visible keys counting the query's own, ``0 <= i - j < window`` (``|i - j| < window``
    when not causal); None for no window. FlashAttention's ``window_size=(left, 0)`` is ``window=left + 1``.
    ``causal``: whether a query sees only keys up to its own position.
    """

    softcap: PositiveNumber | None = None
    scale: PositiveNumber
    window: PositiveInt | None = None
    causal: bool = True

    def __init__(self, **fields: Any) -> None:
        with _one_line_errors(type(self), fields):
            super().__init__(**fields)

    def __hash__(self) -> int:
        # Computed on every attention call; takes half the time of pydantic's own.
        return hash(tuple(self.__dict__.values()))

    @classmethod
    def from_hf(cls, config: Any, layer_idx: int | None = None) -> AttentionConfig:
        """Read a Hugging Face model config (or any object with its field names).

        ``attn_logit_softcapping`` gives the softcap, ``query_pre_attn_scalar ** -0.5`` the scale (without it
        ``head_dim ** -0.5``, as Hugging Face does), ``sliding_window`` the window. With ``layer_idx`` the
        window is kept only where ``layer_types[layer_idx]`` is ``"sliding_attention"``; without it the
        config describes a global layer if ``layer_types`` mixes kinds. A config from before ``layer_types`` is read as
        the models' own code did: by its ``sliding_window_pattern``, and Gemma-2's even layers slide. Not causal are
        models whose ``is_causal`` is False, and EmbeddingGemma and its like by ``use_bidirectional_attention``.

        Raises ValueError or TypeError if a field is missing or has an impossible value, if ``layer_idx`` is out of
        range, or if the layer is neither full nor sliding attention.
        """
        get_text = getattr(config, "get_text_config", None)
        config = get_text() if callable(get_text) else config
        softcap = getattr(config, "attn_logit_softcapping", None)
        check_positive("attn_logit_softcapping", softcap)
        window = _hf_window(config, layer_idx)
        if window is not None and getattr(config, "is_causal", None) is False:
            window += 1  # transformers then shows keys up to the window's distance: abs(i - j) <= sliding_window
        return cls(softcap=softcap, scale=_hf_scale(config), window=window, causal=_hf_causal(config))


def hf_count(config: Any, name: str) -> int:
    """The field ``name`` of a Hugging Face config. Raises as ``checked_count`` does."""
    return checked_count(name, getattr(config, name, None), "; correct the model's config")


def _is_integer(value: Any) -> bool:
    # An int at once: asking a protocol takes 5 us.
    return type(value) is int or (isinstance(value, SupportsIndex) and not isinstance(value, bool))


def _hf_scale(config: Any) -> float:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        scalar = hf_head_dim(config)
    check_positive("query_pre_attn_scalar", scalar)
    return float(scalar) ** -0.5


def hf_head_dim(config: Any) -> int:
    """``head_dim`` of a Hugging Face config, or ``hidden_size // num_attention_heads`` where it has none."""
    if getattr(config, "head_dim", None) is not None:
        return hf_count(config, "head_dim")
    names = ("hidden_size", "num_attention_heads")
    if any(getattr(config, name, None) is None for name in names):
        raise ValueError(
            f"config: {type(config).__name__} has none of query_pre_attn_scalar, head_dim, or hidden_size with "
            "num_attention_heads; pass a Hugging Face attention config or build AttentionConfig(scale=...)"
        )
    hidden, heads = (hf_count(config, name) for name in names)
    if hidden < heads:
        raise ValueError(f"hidden_size: {hidden}, expected at least num_attention_heads, which is {heads}")
    return hidden // heads


def _hf_window(config: Any, layer_idx: int | None) -> int | None:
    kinds = _hf_kinds(config, layer_idx)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    window = hf_count(config, "sliding_window")
    return window if all(kind == SLIDING for kind in kinds) else None


def _hf_causal(config: Any) -> bool:
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if getattr(config, "is_causal", None) is False or both_ways == "all":
        return False
    # True in configs of Gemma and Gemma-2 too, inside of PaliGemma's, which is causal but for its prefix.
    return not (both_ways is True and getattr(config, "model_type", None) == "gemma3_text")


def _hf_kinds(config: Any, layer_idx: int | None) -> list[str]:
    """The kind of layer ``layer_idx``, or every kind of layer if it is None; empty if the config names no kinds."""
    kinds = getattr(config, "layer_types", None)
    if not (kinds is None or isinstance(kinds, (list, tuple))):
        raise TypeError(f"layer_types: {kinds!r}, expected a list of {FULL!r} and {SLIDING!r}")
    if layer_idx is None:
        return _kinds_by_pattern(config) if kinds is None else list(kinds)
    if not _is_integer(layer_idx):
        raise TypeError(f"layer_idx: {layer_idx!r}, expected an integer, or None for a global layer")
    count = len(kinds) if kinds is not None else None
    if kinds is None and getattr(config, "num_hidden_layers", None) is not None:
        count = hf_count(config, "num_hidden_layers")
    if layer_idx < 0 or (count is not None and layer_idx >= count):
        most = "" if count is None else f" and less than the model's {count} layers"
        raise ValueError(f"layer_idx: {layer_idx}, expected at least 0{most}")
    if kinds is None:
        return _kinds_by_pattern(config, layer_idx)
    if kinds[layer_idx] not in (FULL, SLIDING):
        raise ValueError(
            f"layer_types[{layer_idx}]: {kinds[layer_idx]!r}, expected {FULL!r} or {SLIDING!r}; "
            "no AttentionConfig describes such a layer"
        )
    return [kinds[layer_idx]]


def _kinds_by_pattern(config: Any, layer_idx: int | None = None) -> list[str]:
    """What ``_hf_kinds`` gives for a config from before ``layer_types``, by the rules of the models' own code.

    Every ``sliding_window_pattern``-th layer is global; Gemma-2, whose configs don't say so, has a pattern of 2.
    """
    if getattr(config, "sliding_window_pattern", None) is not None:
        pattern = hf_count(config, "sliding_window_pattern")
    elif getattr(config, "model_type", None) == "gemma2":
        pattern = 2
    else:
        return []
    if layer_idx is None:
        return [FULL] if pattern == 1 else [SLIDING, FULL]
    return [SLIDING if (layer_idx + 1) % pattern else FULL]


class PrewarmRequest(_Frozen):
    """Kernels to prepare: a description of the calls to come.

    ``config``, ``num_heads``, ``num_kv_heads`` (a divisor of it), ``head_dim``: of the layer. ``seq_lens``: lengths, up
    to 2**24, whose masks to prepare as well; kernels take any length. ``dtype``, ``device``: of q, k and v, torch's own
    or their names. ``train``: whether gradients will be needed. ``paged``: whether ``Runtime.paged_attention`` will be
    called, which has its own kernels on CUDA.
    """

    # A serving process makes no requests, so the validator is built with the first one.
    model_config = ConfigDict(defer_build=True)

    config: AttentionConfig
    num_heads: PositiveInt
    num_kv_heads: Annotated[PositiveInt, AfterValidator(_divides_heads)]
    head_dim: PositiveInt
    seq_lens: tuple[Length, ...] = ()
    dtype: Annotated[DtypeName, BeforeValidator(_torch_name)] = "bfloat16"
    device: Annotated[str, BeforeValidator(_torch_name)] = "cpu"
    train: bool = False
    paged: bool = False

    def __init__(self, **fields: Any) -> None:
        with _one_line_errors(type(self), fields):
            super().__init__(**fields)


def default_cache_dir() -> Path:
    """``cache/`` of a checkout; the user's cache folder when the package is installed elsewhere.

    Raises ValueError for a user without a home folder.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file() and (root / "cache" / ".gitignore").is_file():
        return root / "cache"
    try:
        return Path(platformdirs.user_cache_dir("softcap_runtime", appauthor=False))
    except RuntimeError:
        raise ValueError(
            "cache_dir: not set, and this user has no home folder (HOME is not set) for the default; set "
            "SOFTCAP_CACHE_DIR"
        ) from None


class RuntimeSettings(_Frozen, BaseSettings):
    """Settings of a runtime; each is read from ``SOFTCAP_<NAME>`` where it is not given (empty counts as unset).

    ``cache_dir``: folder of the kernel cache. ``cache_size_limit``: its size in bytes (``"4GB"`` works); the
    least recently used entries leave first. ``cache_key_file``: a file whose bytes authenticate entries
    (HMAC-SHA256). ``jit``: what to do when a kernel is missing: build it (``allow``), build it and log a
    warning (``warn``), raise KernelNotPrewarmed (``forbid``). ``build``: whether a call waits for a missing
    kernel (``block``) or is served by another engine meanwhile (``background``). ``engine``: which engine
    serves calls; ``auto`` picks per key. ``softcap_approx`` (``SOFTCAP_APPROX``): let the kernels on CUDA take
    the cap's tanh from the ``tanh.approx.f32`` instruction, relative error 2**-11, so a logit is off by up to
    ``softcap * 5e-4``; nothing changes on the CPU.
    """

    model_config = SettingsConfigDict(env_prefix="SOFTCAP_", env_ignore_empty=True)

    cache_dir: UserPath = Field(default_factory=default_cache_dir)
    cache_size_limit: Annotated[ByteSize, BeforeValidator(_no_bool)] = Field(default=ByteSize(2 * 1024**3), gt=0)
    cache_key_file: UserPath | None = None
    jit: Literal["allow", "warn", "forbid"] = "allow"
    build: Literal["block", "background"] = "block"
    engine: EngineName = "auto"
    # The alias is the variable's whole name: SOFTCAP_APPROX.
    softcap_approx: bool = Field(default=False, validation_alias="softcap_approx")

    def __init__(self, **fields: Any) -> None:
        with _one_line_errors(type(self), fields):
            super().__init__(**fields)


def _variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"SOFTCAP_{field.removeprefix('softcap_').upper()}"


def unknown_variables() -> list[str]:
    """A line for each environment variable ``SOFTCAP_...`` that nothing reads, with the known one that it is most like.

    Those of the tests, ``SOFTCAP_TEST_...``, are left out.
    """
    known = {*map(_variable, RuntimeSettings.model_fields), "SOFTCAP_PUBLIC_TORCH_ONLY"}
    names = {name: name.upper() for name in sorted(os.environ) if name.upper().startswith("SOFTCAP_")}
    unknown = [name for name, upper in names.items() if upper not in known and not upper.startswith("SOFTCAP_TEST_")]
    return [
        f"environment variable {name}: unknown, ignored; the closest known one is {_closest(names[name], known)}"
        for name in unknown
    ]
