"""The job file and its templates: what is taken, and that every refusal names the key, the place and the way out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayinfer.errors import ConfigError, ErrorType, RowError
from rayinfer.pipelines.job import JobSpec, load_job
from rayinfer.pipelines.template import PromptTemplate

GOOD: dict[str, Any] = {
    "source": {"uri": "in"},
    "prompt": "{{ text }}",
    "model": {"model_source": "org/name"},
    "sink": {"uri": "out"},
}


def changed(**parts: Any) -> dict[str, Any]:
    return {key: value for key, value in {**GOOD, **parts}.items() if value is not None}


def test_paths_are_relative_to_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "models/tiny").mkdir(parents=True)
    path = tmp_path / "jobs/job.yaml"
    path.write_text(yaml.safe_dump(changed(source={"uri": "../in", "limit": 5}, model="../models/tiny")))
    monkeypatch.chdir("/")
    spec = load_job(path)
    assert (spec.source.uri, spec.sink.uri) == (str(tmp_path / "in"), str(tmp_path / "jobs/out"))
    assert spec.model.model == str(tmp_path / "models/tiny")
    assert load_job(path, limit=2).source.limit == 2
    assert JobSpec.parse(GOOD).model.model == "org/name"
    spec = JobSpec.parse(changed(source={"uri": "s3://bucket/in"}, model={"model_source": "sub/x.gguf"}), base=tmp_path)
    assert (spec.source.uri, spec.model.model) == ("s3://bucket/in", str(tmp_path / "sub/x.gguf"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"sorce": {}}, r"job: unknown key 'sorce'; did you mean 'source'\? Known keys: .*sink, source"),
        ({"sink": {"uri": "o", "fromat": "csv"}}, r"unknown key 'sink.fromat'; did you mean 'format'\?"),
        ({"sampling": {"temprature": 1}}, r"unknown key 'sampling.temprature'; did you mean 'temperature'\?"),
        (
            {"model": {"model_source": "a", "blok_size": 1}},
            r"unknown key 'model.blok_size'; did you mean 'block_size'\?",
        ),
        ({"sampling": {"temperature": -1}}, r"job: sampling.temperature = -1: .* greater than or equal to 0"),
        ({"sampling": {"max_tokens": 0}}, r"job: sampling.max_tokens = 0"),
        ({"model": {"block_size": 16}}, r"job: model = .*: model_source is missing"),
        ({"model": None}, r"job: model = .*: Field required"),
        ({"source": {"uri": ""}}, r"job: source.uri = ''"),
        ({"source": {"uri": "x", "format": "xml"}}, r"source.format = 'xml': .*'csv', 'delta' or 'iceberg'"),
        ({"prompt": None}, r"exactly one of prompt and messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"exactly one of prompt and messages"),
        ({"prompt": None, "messages": [{"role": "boss", "content": "x"}]}, r"job: messages.0.role = 'boss'"),
        ({"prompt": None, "messages": []}, r"job: messages = \[\]"),
        ({"prompt": "{{ text "}, r"job: prompt: line 1 of the template: "),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "a\n{% if %}"}]},
            r"job: messages.0.content: line 2",
        ),
        ({"processor": {"concurrency": 0}}, r"job: processor.concurrency = 0: want a number of engines"),
        ({"processor": {"concurrency": [2, 1]}}, r"job: processor.concurrency = \[2, 1\]"),
        ({"on_error": "ignore"}, r"job: on_error = 'ignore': .*'record' or 'raise'"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(parts, message):
    with pytest.raises(ConfigError, match=message):
        JobSpec.parse(changed(**parts))


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        JobSpec.parse(changed(sorce={}, sampling={"top_p": 2}, sink={}))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"job.yaml: not valid YAML: line \d+"),
        (
            "source: {uri: a}\nsource: {uri: b}",
            r"job.yaml: not valid YAML: line 2, column 1: key 'source' is there twice",
        ),
        ("prompt: {{ text }}", "job.yaml: not valid YAML: line 1, column 10: put quotes around a text that has {{ }}"),
        ("source: 2001-99-99", "job.yaml: not valid YAML: month must be in 1..12"),
        ("- a", "job.yaml: want a mapping"),
        ("", "job.yaml: want a mapping"),
        ("!!python/object/apply:os.getcwd []", "job.yaml: not valid YAML: .*could not determine a constructor"),
    ],
)
def test_job_files_that_are_none(tmp_path: Path, text: str, message: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_job(path)
    with pytest.raises(ConfigError, match=r"job file .*no.yaml': No such file"):
        load_job(tmp_path / "no.yaml")


def test_keys_may_be_merged(tmp_path):
    path = tmp_path / "job.yaml"
    head = "prompt: x\nsource: {uri: a}\nmodel: m\nsampling: &a {seed: 1, top_k: 2}\n"
    path.write_text(f"{head}sink: {{uri: o}}\n")
    assert load_job(path).sampling.top_k == 2
    path.write_text("x: &a {uri: a, limit: 1}\ny: &b {<<: *a, limit: 2}\n<<: *b\n")
    with pytest.raises(ConfigError) as caught:  # not for a key that is there twice
        load_job(path)
    assert "twice" not in str(caught.value)
    assert "unknown key 'limit'" in str(caught.value)


def test_templates_render_text_and_messages():
    template = PromptTemplate(
        messages=[("system", "Be {{ how }}.\n"), ("user", "{% if x %}{{ x }}{% endif %}{{ row['a b'] }}")]
    )
    template = pickle.loads(pickle.dumps(template))
    template.check_columns(["how", "x", "a b"])
    row = {"how": "short", "x": None, "a b": "{{ how }}"}
    assert template.render(row) == {
        "messages": [{"role": "system", "content": "Be short.\n"}, {"role": "user", "content": "{{ how }}"}]
    }
    template = PromptTemplate("{% for k, v in row.items() %}{{ k }}{{ row.get(k) }}{% endfor %}")
    template.check_columns(["a"])
    assert template.render({"a": 1}) == {"prompt": "a1"}
    assert PromptTemplate("{{ n + 1 }}{% for a in l %}{{ a.b }}{% endfor %}").render({"n": 1, "l": [{"b": 2}]}) == {
        "prompt": "22"
    }


def test_json_in_a_prompt_is_the_text_itself():
    row = {"text": "\xfcml\xe4ut, don't <b> \U0001f600", "meta": {"z": 1, "a": ["\xdf"]}}
    assert PromptTemplate("{{ text|tojson }}").render(row) == {"prompt": '"\xfcml\xe4ut, don\'t <b> \U0001f600"'}
    assert PromptTemplate("{{ meta|tojson }}").render(row) == {"prompt": '{"z": 1, "a": ["\xdf"]}'}
    assert PromptTemplate("{{ [1]|tojson(indent=2) }}").render(row) == {"prompt": "[\n  1\n]"}
    assert PromptTemplate("{{ [1]|tojson(1) }}").render(row) == {"prompt": "[\n 1\n]"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ zzz }}", r"uses 'zzz', which is no column of the source. Columns: id, text$"),
        ("{{ txt }}", r"prompt: the template uses 'txt', which is no column of the source; did you mean 'text'\?"),
        ("{{ row['txt'] }}", "uses 'txt'"),
        ("{{ row.txt }}", "uses 'txt'"),
        ("{% for c in text %}{{ c }}{{ d }}{% endfor %}", "uses 'd'"),
        ("{{ range(3) }}", "uses 'range'"),
    ],
)
def test_unknown_columns(text, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(text).check_columns(["id", "text"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ x.secret }}", "UndefinedError"),
        ("{{ n }}", "prints a null value.*; null in this row: n$"),
        ("{{ x|length }}{{ row['n'] }}{{ zero }}", "; null in this row: n$"),
        ("{% for i in [none] %}{{ i }}{% endfor %}", "; null in this row: something in a value$"),
        ("{{ 1 / zero }}", "the template raised ZeroDivisionError"),
        ("{{ x.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__ }}", "SecurityError"),
        ("{{ l.append(1) }}", "SecurityError"),
        ("{{ row.update({'a': 1}) }}", "SecurityError"),
        ("{% include 'x' %}", "the template raised TypeError"),
        ("{{ raw }}", r"TypeError .*: printed bytes is no text; of bytes use x\.decode"),
        ("{{ d.items }}", r"builtin_function_or_method is no text; .* of a field x\['items'\]"),
    ],
)
def test_a_row_that_its_template_cannot_take(text, message):
    with pytest.raises(RowError, match=message) as caught:
        PromptTemplate(text).render({"x": "TOP-SECRET", "n": None, "zero": 0, "l": [], "raw": b"a", "d": {"items": 1}})
    assert caught.value.type == ErrorType.TEMPLATE_ERROR
    assert "TOP-SECRET" not in str(caught.value)


def test_long_rows_may_be_truncated():
    """The sandbox took text and width for factors of what `truncate` returns, and refused just the long rows."""
    for width, num in ((20_000, 15_000), (10_000, 30_000), (200_000, 500)):
        (text,) = PromptTemplate(f"{{{{ x | truncate({width}, true, '') }}}}").render({"x": "a" * num}).values()
        assert len(text) == min(width, num)
