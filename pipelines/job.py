"""The job file: what to read, what to ask, which model, where the table goes."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, bare_uri, explain_validation
from rayinfer.pipelines.template import PromptTemplate
from rayinfer.sampling import SamplingParams

FileFormat = Literal["parquet", "jsonl", "csv"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _as_text(item: Any) -> str:
    """What pyiceberg wants of a property, of which YAML may have made a boolean or a number."""
    return str(item).lower() if isinstance(item, bool) else str(item)


_Secret = Annotated[SecretStr, BeforeValidator(_as_text)]


class CatalogSpec(_Spec):
    """An Iceberg catalog, as pyiceberg knows it; what is not given here it takes from its own configuration."""

    name: Annotated[str, Field(min_length=1, description="as in .pyiceberg.yaml")] = "default"
    type: Annotated[str | None, Field(description="rest, sql, glue, hive, ...")] = None
    uri: str | None = None
    warehouse: str | None = None
    properties: Annotated[dict[str, _Secret], Field(exclude=True, description="others; kept nowhere")] = {}

    def settings(self) -> dict[str, str]:
        """What pyiceberg's load_catalog takes."""
        plain = self.model_dump(include={"type", "uri", "warehouse"}, exclude_none=True)
        return plain | {key: value.get_secret_value() for key, value in self.properties.items()}

    def say(self, error: Exception) -> str:
        """The first line of an error, without the catalog's secrets."""
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        for secret in self.properties.values():
            text = text.replace(secret.get_secret_value() or "\n", "***")
        return bare_uri(text)


class _PlaceSpec(_Spec):
    format: Any
    uri: Annotated[str, Field(min_length=1, description="file, folder or glob; any fsspec URI that all nodes reach")]
    table: Annotated[str | None, Field(pattern=r"^.+\..+$", description="Iceberg: namespace.name")] = None
    catalog: Annotated[CatalogSpec | None, Field(description="Iceberg: where the table's name is kept")] = None

    @model_validator(mode="after")
    def _table_named(self) -> Self:
        for name in ("table", "catalog"):
            if (getattr(self, name) is None) == (self.format == "iceberg"):
                raise ValueError(f"{name} is given if format is iceberg, and only then")
        return self


class SourceSpec(_PlaceSpec):
    format: Literal["auto", "parquet", "jsonl", "csv", "delta", "iceberg"] = "auto"  # by the file names
    version: Annotated[int | None, Field(ge=0, description="or snapshot, of a table; default: the newest")] = None
    columns: Annotated[list[str] | None, Field(min_length=1, description="columns to read; default: all")] = None
    limit: Annotated[int | None, Field(ge=1, description="only the first rows, in file order")] = None
    id_column: Annotated[str | None, Field(description="unique integer or string; default: a row_key is made")] = None


class MessageSpec(_Spec):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(description="Jinja2 template over the row's columns")]


def _check_range(value: Any) -> Any:
    some = value if isinstance(value, list | tuple) else [value]
    if any(type(item) is not int for item in some) or len(some) not in (1, 2) or not 1 <= some[0] <= some[-1]:
        raise ValueError("want a number of engines >= 1, or [min, max]")
    return value


_Range = Annotated[int | tuple[int, int], BeforeValidator(_check_range)]


class ProcessorSpec(_Spec):
    batch_size: Annotated[int | None, Field(ge=1, description="rows given to an engine at once")] = None
    concurrency: Annotated[_Range, Field(description="engines, or [min, max]")] = 1


class SinkSpec(_PlaceSpec):
    format: Literal["parquet", "jsonl", "csv", "delta", "iceberg"] = "parquet"
    rows_per_part: Annotated[int, Field(ge=1, description="a part is written when so many rows are finished")] = 5000
    flush_seconds: Annotated[float, Field(gt=0, description="or when a row has been finished for so long")] = 60.0
    columns: Annotated[list[str] | None, Field(description="source columns to keep; default: all read")] = None

    @property
    def file_format(self) -> FileFormat:
        """Of the parts."""
        return "parquet" if self.format == "delta" or self.format == "iceberg" else self.format


def _engine(value: Any) -> Any:
    """A model alone, or `model_source` among settings, as EngineConfig has it."""
    if isinstance(value, str):
        return {"model": value}
    if isinstance(value, dict) and "model" not in value:
        if "model_source" not in value:
            raise ValueError("model_source is missing: a local folder, a .gguf file or a hub id")
        return {"model" if key == "model_source" else key: item for key, item in value.items()}
    return value


class JobSpec(_Spec):
    """One job. Exactly one of `prompt` and `messages` is given; relative paths are relative to `base`.

    Raises:
        ConfigError: from `parse` and `load_job`, one line for each thing that is wrong.
    """

    source: SourceSpec
    prompt: Annotated[str | None, Field(description="Jinja2 template; no chat template is applied")] = None
    messages: Annotated[list[MessageSpec] | None, Field(min_length=1, description="chat messages")] = None
    model: Annotated[EngineConfig, BeforeValidator(_engine), Field(description="model_source and engine settings")]
    sampling: SamplingParams = SamplingParams()
    processor: ProcessorSpec = ProcessorSpec()
    sink: SinkSpec
    on_error: Annotated[Literal["record", "raise"], Field(description="record: a failed row costs one row")] = "record"

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("want exactly one of prompt and messages")
        return self

    def template(self) -> PromptTemplate:
        return PromptTemplate(self.prompt, [(m.role, m.content) for m in self.messages or ()])

    @classmethod
    def parse(cls, value: Any, *, place: str = "job", base: str | os.PathLike[str] = ".") -> Self:
        """Validate a mapping; `place` begins every error line, `base` is what relative paths hang on."""
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: want a mapping with source, prompt or messages, model and sink")
        try:
            spec = cls.model_validate(value)
            spec.template()
        except ValidationError as error:
            raise ConfigError(explain_validation(error, cls, place)) from None
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        places = {name: getattr(spec, name) for name in ("source", "sink")}
        parts = {name: place.model_copy(update={"uri": resolve_uri(place.uri, base)}) for name, place in places.items()}
        paths = {name: getattr(spec.model, name) for name in ("model", "tokenizer")}
        paths = {name: path and _resolve_model(path, base) for name, path in paths.items()}
        return spec.model_copy(update={**parts, "model": spec.model.model_copy(update=paths)})


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a key appear twice and keeps the last; half of what was typed would be ignored in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            plain = isinstance(key, yaml.ScalarNode)
            if not plain or key.value in seen:
                text = f"key {key.value!r} is there twice" if plain else "put quotes around a text that has {{ }} in it"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def load_job(path: str | os.PathLike[str], *, limit: int | None = None) -> JobSpec:
    """Read a job file; its relative paths are relative to the folder that the file is in."""
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"job file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # of its constructors too: a month 99
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path.name}: not valid YAML: {where}{getattr(error, 'problem', error)}") from None
    spec = JobSpec.parse(value, place=path.name, base=path.parent)
    if limit is not None:
        spec = spec.model_copy(update={"source": spec.source.model_copy(update={"limit": limit})})
    return spec


def resolve_uri(uri: str, base: str | os.PathLike[str]) -> str:
    """Make a local path absolute; a URI with a scheme stays as it is."""
    return uri if "://" in uri or "::" in uri else os.path.abspath(os.path.join(base, os.path.expanduser(uri)))


def _resolve_model(source: str, base: str | os.PathLike[str]) -> str:
    """A path if it looks like one or is there; else a hub id (`org/name`), which looks like a path and is none."""
    local = resolve_uri(source, base)
    return local if source.startswith((".", "/", "~")) or source.endswith(".gguf") or os.path.exists(local) else source
