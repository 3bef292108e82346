"""Write docs/job.md, the reference of a job's file, from the classes that read it.

python tools/job_reference.py
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayinfer.config import EngineConfig
from rayinfer.pipelines.job import CatalogSpec, JobSpec, MessageSpec, ProcessorSpec, SinkSpec, SourceSpec
from rayinfer.sampling import SamplingParams

PATH = Path(__file__).resolve().parent.parent / "docs" / "job.md"
HEAD = """# The file of a job

`rayinfer run FILE` reads this YAML. The tables are made from the code by `tools/job_reference.py`. Paths are relative
to the file; unknown keys are refused. `*` marks what must be given; of `prompt` and `messages` exactly one.

```yaml
source: {uri: in/*.parquet, id_column: id}
messages:
  - {role: user, content: "Summarize in one sentence: {{ text }}"}
model: {model_source: path/or/hub-id, max_model_len: 2048}
sampling: {temperature: 0, max_tokens: 64}
sink: {uri: out, format: parquet}
```

Templates are Jinja2 over a row's columns, in a sandbox: `{{ text }}`, or `{{ row["a name with spaces"] }}`; a name is a
column or a mistake, so there are no globals such as `range`. A null that would be printed fails the row;
`{{ '' if note is none else note }}` allows it. (One that a filter or `~` made text of is not seen: `{{ note | trim }}`
prints `None`.) A template that cuts through a control token of a row's text (`{{ text[:100] }}`) fails that row.

The rows of the table that is written are in no order. `limit`, like the prompt, the model and the sampling, is part of
what a job is: with another one it wants another output folder, or `--overwrite`. A model folder is known by the sizes
of its files, the ends of its weights and the whole of the others; a hub id by its name and `revision`.
"""
PARTS = {
    "": JobSpec, "source": SourceSpec, "messages, each": MessageSpec, "model": EngineConfig, "sampling": SamplingParams,
    "processor": ProcessorSpec, "sink": SinkSpec, "source.catalog, sink.catalog": CatalogSpec,
}  # fmt: skip


def kind(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(arg) for arg in args if arg is not type(None)))
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is not None and hasattr(annotation, "__metadata__"):
        return kind(args[0])
    if origin in (list, tuple):
        return "list"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(annotation.__name__, "any")


def reference() -> str:
    lines = [HEAD]
    for name, part in PARTS.items():
        lines += [f"## {name or 'The whole'}\n", "| key | what | default | |", "|---|---|---|---|"]
        for key, field in part.model_fields.items():
            key = "model_source" if part is EngineConfig and key == "model" else key
            value = field.get_default(call_default_factory=True)
            value = str(value).lower() if isinstance(value, bool) else value
            none = value in (PydanticUndefined, None, ()) or isinstance(value, BaseModel)
            shown = "" if none else f"`{value}`"
            mark = "*" if field.is_required() else ""
            lines.append(f"| `{key}`{mark} | {kind(field.annotation)} | {shown} | {field.description or ''} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
