"""The server's settings: flags of `exeunt serve`, each also an environment variable `EXEUNT_<NAME>`."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from exeunt.server.api.schemas import CompressionOptions, EarlyExitOptions
from exeunt.server.api.strict_json import RepeatedKeyError, parse_json
from exeunt.server.api.validation import nearest, requirement, shown
from exeunt.server.audit import DEFAULT_SHARE
from exeunt.server.stage_choice import SchedulingPolicy

ENV_PREFIX: Final = "EXEUNT_"
_OTHERS: Final = frozenset(
    {"EXEUNT_NATIVE", "EXEUNT_TRITON", "EXEUNT_TUNED", "EXEUNT_PUBLISHED_PORT"}
)  # of kernels, compose


def _comma_separated(value: Any) -> Any:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


def _json_object(value: Any) -> Any:
    try:
        return parse_json(value) if isinstance(value, str) else value
    except RepeatedKeyError:
        raise
    except ValueError as error:
        raise ValueError('it must be a JSON object such as {"kv_cache": "full"}') from error


_REQUIREMENTS: Final = {
    "byte_size": "it must be a number of bytes such as 512MiB",
    "byte_size_unit": "it must be a number of bytes such as 512MiB",
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "bool_parsing": "it must be true or false",
    "string_pattern_mismatch": "it must be auto, cpu, cuda or cuda:N",  # there is one pattern, the device's
}
"""What a value must be, where pydantic's own words are not for users."""


class Settings(BaseSettings):
    """Everything `exeunt serve` can be told. What is not given on the command line is read from the environment.

    Raises pydantic's ValidationError for a value of the wrong type or beyond its limits.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str | None = Field(
        default=None, description="A bundle, a checkpoint's directory or a Hugging Face id."
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="The address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Ask every request but the probes for `Authorization: Bearer KEY`.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="The model's name in responses and metrics; its own unless given.",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto, float32, bfloat16 or float16."
    )
    weights: Literal["int4", "full", "both"] = Field(
        default="both", description="Which of a bundle's weights to load: int4, full or both."
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="Tokens, prompt and answer together; the model's limit unless given."
    )
    max_num_seqs: int = Field(default=64, ge=1, description="Sequences that run at once.")
    max_num_queued_reqs: int = Field(default=256, ge=1, description="Requests that may wait.")
    max_num_batched_tokens: int = Field(default=512, ge=1, description="Tokens of one step.")
    kv_cache_memory: ByteSize | None = Field(
        default=None, gt=0, description="Bytes of the KV cache, e.g. 512MiB; by free memory unless given."
    )
    default_compression: Annotated[CompressionOptions, NoDecode, BeforeValidator(_json_object)] = Field(
        default_factory=CompressionOptions, description="What a request's compression block leaves out."
    )
    audit_share: float = Field(
        default=DEFAULT_SHARE,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of approximate early tokens that are compared with the full model.",
    )
    exit_guard: bool = Field(
        default=False, description="Raise a target's threshold while audits disagree more than the target."
    )
    enforce_eager: bool = Field(
        default=False, description="On a GPU, capture no CUDA graphs: slower, and what they hold is free."
    )
    async_scheduling: bool = Field(
        default=True,
        description="On a GPU, begin a decode step while the host still waits for the tokens of the one before.",
    )
    tuning_seconds: float = Field(
        default=20.0,
        ge=0,
        allow_inf_nan=False,
        description="On a GPU, seconds to search at the start for fast launches of what is not known yet.",
    )
    scheduling: SchedulingPolicy = Field(
        default="run-through",
        description="run-through: a step runs all stages; queues: rows wait at exits until enough have gathered.",
    )
    longest_wait: float = Field(
        default=0.05,
        gt=0,
        allow_inf_nan=False,
        description="With queues, seconds after which a waiting row's stage runs next.",
    )
    request_timeout: float = Field(
        default=600.0, gt=0, allow_inf_nan=False, description="Seconds a request may take."
    )
    shutdown_timeout: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="Seconds to finish what runs."
    )
    max_body_bytes: ByteSize = Field(
        default=ByteSize(4 * 2**20), gt=0, description="The largest request body."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)] = Field(
        default=(), description="Browser origins that may ask (CORS), comma-separated; * is any."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What to log: debug, info, warning or error."
    )
    log_json: bool = Field(default=False, description="Log JSON lines.")


class _GivenSettings(Settings):
    """Settings that the environment has no part in."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was given, and nothing else."""
        return (init_settings,)


def load_settings(given: Mapping[str, object]) -> Settings:
    """The settings of what was given, the environment, and the defaults, in this order; raises ValidationError."""
    return Settings(**given)  # type: ignore[arg-type] # values are checked by pydantic


def given_settings(given: Mapping[str, object]) -> Settings:
    """The settings of what was given and the defaults, for what is no server; raises ValidationError."""
    return _GivenSettings(**given)  # type: ignore[arg-type] # values are checked by pydantic


def setting_help(name: str) -> str:
    """What the setting `name` is for, with its default in brackets where it has one."""
    default = setting_default(name)
    return f"{Settings.model_fields[name].description}{f' [{default}]' if default else ''}"


def setting_default(name: str) -> str:
    """The default of the setting `name` as one would type it; empty where nothing is the default."""
    default = Settings.model_fields[name].default
    if default is None or default is PydanticUndefined or default is False or default == ():
        return ""
    if isinstance(default, ByteSize):
        return default.human_readable().replace(".0", "")
    if default is True:
        return "on"
    return f"{default:g}" if isinstance(default, float) else str(default)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: likely misspelt, and otherwise passed over in silence."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | _OTHERS
    return sorted(
        name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    )


def nearest_variable(name: str) -> str:
    """Which variable a misspelt one is likely meant to be: in parentheses, behind a blank, if that can be guessed."""
    guess = nearest(name.upper().removeprefix(ENV_PREFIX).lower(), Settings.model_fields)
    return re.sub(r"(?<=mean )(\w+)", lambda found: f"{ENV_PREFIX}{found[1].upper()}", guess)


def invalid_setting(error: ValidationError, given: Mapping[str, object]) -> str:
    """One sentence for the first thing wrong with the settings: the flag, its value, what it must be.

    Of a setting that was not `given` the environment's variable is named too: that is where it is to be mended.
    """
    first = error.errors()[0]
    name, *inside = (str(part) for part in first["loc"])
    flag = f"--{name.replace('_', '-')}"
    if name not in given:
        flag = f"{ENV_PREFIX}{name.upper()} ({flag})"
    within = f" ({'.'.join(inside)})" if inside else ""
    value = "" if name == "api_key" else f" is {shown(first['input'])}"
    if first["type"] == "extra_forbidden":
        return f"{flag}{within}{value}; {_no_such_field(inside)}."
    return f"{flag}{within}{value}; {_REQUIREMENTS.get(first['type']) or requirement(first)}."


def _no_such_field(path: Sequence[str]) -> str:
    """What to say of an unknown field of `compression`, and which one is likely meant."""
    known = (CompressionOptions if len(path) == 1 else EarlyExitOptions).model_fields
    guess = nearest(path[-1], known)
    return f"there is no such field{guess}; the fields are those of `compression` in POST /generate"
