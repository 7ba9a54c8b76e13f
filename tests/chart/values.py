"""The values: linted, closed at every level, and each of them with an effect."""

import concurrent.futures
import copy
import json
import pathlib
import re
import tempfile

import yaml

from common import CHART, LOADER, PROFILES, check, helm, profile, template, values_file

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Where Kubernetes checks and the chart hands on, and what Helm itself puts in.
OPEN = {"global", "affinity.nodeAffinity", "affinity.podAffinity", "affinity.podAntiAffinity"}
UNKNOWN = "valueThatIsNotThere"
# Something that each pattern takes, where the pattern allows no simple word.
SAMPLES = {"digest": "sha256:" + "0" * 64, "urls": "redis://r:6379", "value": "ab" * 32}


def resolve(schema):
    """A schema behind its reference."""
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def sample(schema, name):
    """A small value that the schema takes."""
    schema = resolve(schema)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return sample(schema["anyOf"][0], name)
    if schema["type"] == "object":
        wanted = list(schema.get("required", []))
        if schema.get("minProperties") and not wanted:
            wanted = [next(iter(schema["properties"]))]
        return {key: sample(schema["properties"][key], key) for key in wanted}
    if schema["type"] == "array":
        return [sample(schema["items"], name)] if schema.get("minItems") else []
    if schema["type"] in ("integer", "number"):
        return max(1, schema.get("minimum", 1))
    return False if schema["type"] == "boolean" else SAMPLES.get(name, "a")


def levels(schema, path=(), build=lambda inner: inner):
    """Every object schema with its path and a function that puts a value there into whole values."""
    schema = resolve(schema)
    if schema.get("type") == "object":
        yield path, schema, build
        for key, inner in schema.get("properties", {}).items():
            def deeper(value, key=key, schema=schema, build=build, optional=bool(path) and path[-1] == "[]"):
                # Helm merges maps with the defaults, but replaces lists: their items must be whole.
                base = sample(schema, "") if optional else {}
                return build({**base, key: value})
            yield from levels(inner, (*path, key), deeper)
    elif schema.get("type") == "array":
        def item(value, build=build):
            return build([value])
        yield from levels(schema["items"], (*path, "[]"), item)


def taken(values):
    """Whether the schema takes the values, and what is said; a later refusal by the templates is another matter."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        answer = template("--values", file.name)
    return "values don't meet the specifications" not in answer.stderr, answer.stderr


@check
def every_profile_passes_the_strict_lint():
    for name in PROFILES:
        answer = helm("lint", "--strict", CHART, "--values", values_file(name), "--namespace", "rag")
        assert answer.returncode == 0, f"{name}: {answer.stdout}{answer.stderr}"


@check
def every_profile_renders_objects_of_different_names():
    seen = {path.stem for path in (CHART / "ci").glob("*.yaml")}
    assert seen == set(PROFILES), f"ci/ has {seen}"
    for name in PROFILES:
        objects = profile(name)
        names = [(each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in objects]
        assert len(names) == len(set(names)) and len(names) > 10, f"{name}: {names}"


@check
def every_object_of_the_schema_is_closed():
    for path, schema, _ in levels(SCHEMA):
        dotted = ".".join(path)
        if any(dotted == one or dotted.endswith("." + one) for one in OPEN):
            continue
        assert "additionalProperties" in schema, f"{dotted or 'root'} takes anything"
        assert schema["additionalProperties"] is not True, f"{dotted or 'root'} takes anything"


@check
def an_unknown_value_is_refused_at_every_level():
    closed = [level for level in levels(SCHEMA) if level[1].get("additionalProperties") is False]
    assert len(closed) > 100, f"only {len(closed)} levels were found"

    def judge(level):
        path, schema, build = level
        sound = sample(schema, "")
        accepted, said = taken(build(sound))
        assert accepted, f"the control for {path}: {said}"
        accepted, said = taken(build({**sound, UNKNOWN: 1}))
        assert not accepted and UNKNOWN in said, f"{path} takes an unknown value: {said}"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(judge, closed))


@check
def a_value_of_the_wrong_kind_is_refused():
    for wrong in [
        {"gateway": {"replicaCount": "many"}},
        {"gateway": {"replicaCount": 0}},
        {"log": {"format": "xml"}},
        {"cacheStore": {"persistence": {"accessModes": ["ReadWriteMany"]}}},
        {"gpuWorker": {"profile": "tpu"}},
        {"gpuWorker": {"autoscaling": {"metric": "cpu"}}},
        {"networkPolicy": {"gatewayFrom": []}},
    ]:
        accepted, said = taken(wrong)
        assert not accepted, f"{wrong}: {said}"


def leaves(value, path=()):
    """Every value that is no map, with its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def schema_of(path):
    """The schema of a value."""
    schema = SCHEMA
    for key in path:
        schema = resolve(schema)
        schema = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    return resolve(schema)


# Lists and maps that are empty by default, and texts of a form of their own: something to put there.
OTHERS = {
    "imagePullSecrets": [{"name": "other"}], "tolerations": [{"key": "other"}], "extraArgs": ["--other"],
    "affinity": {"nodeAffinity": {"other": {}}}, "extraEnv": [{"name": "OTHER", "value": "x"}],
    "topologySpreadConstraints": [{"maxSkew": 2, "topologyKey": "other", "whenUnsatisfiable": "DoNotSchedule"}],
    "files": [{"name": "other.json", "digest": "sha256:" + "1" * 64}], "urls": ["redis://other:6379"],
    "relabelings": [{"targetLabel": "other"}], "metricRelabelings": [{"targetLabel": "other"}],
    "egressTo": [{"ipBlock": {"cidr": "198.51.100.0/24"}}], "gatewayFrom": [{"ipBlock": {"cidr": "198.51.100.0/24"}}],
    "metricsFrom": [{"ipBlock": {"cidr": "198.51.100.0/24"}}], "dnsTo": [{"ipBlock": {"cidr": "198.51.100.0/24"}}],
    "digest": "sha256:" + "1" * 64, "value": "cd" * 32, "base": "https://other.example.com", "path": "/other",
    "endpoint": "http://other:4318",
    "accessModes": ["ReadWriteOncePod"], "interval": "31s", "scrapeTimeout": "26s", "size": "21Gi",
}  # fmt: skip


def another(path, value, schema):
    """A value that differs and that the schema takes."""
    if path[-1] in OTHERS:
        return OTHERS[path[-1]]
    if "enum" in schema:
        return next((each for each in schema["enum"] if each != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if schema.get("maximum") != 1 else value / 2
    if isinstance(value, dict):
        return {"other": "x"}
    if value[:1].isdigit():
        return str(int(value.rstrip("kKMGTim")) + 1) + value.lstrip("0123456789")
    return value + "other"


def put(values, path, value):
    """The values with one replaced."""
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return values


def outcome(values):
    """What is rendered, or how it is refused; without the secrets that are drawn anew each time."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        answer = template("--values", file.name)
    assert "values don't meet the specifications" not in answer.stderr, answer.stderr
    return answer.stderr or re.sub(r": [A-Za-z0-9+/]{54,}=*$", ": drawn", answer.stdout, flags=re.MULTILINE)


@check
def every_value_has_an_effect():
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    bases = {name: yaml.safe_load(values_file(name).read_text()) or {} for name in PROFILES}
    # Each source of models for each of the two.
    models = bases["gpu"]["models"]
    bases["swapped"] = {"models": {"primary": models["auxiliary"], "auxiliary": models["primary"]}}
    before = {name: outcome(values) for name, values in bases.items()}
    assert before["default"] == outcome(bases["default"]), "two renderings of the same values differ"

    def judge(leaf):
        path, value = leaf
        for name, base in bases.items():
            here = base
            for key in path:
                here = here.get(key, {}) if isinstance(here, dict) else {}
            current = here if here != {} else value
            changed = another(path, current, schema_of(path))
            if changed is not None and outcome(put(base, path, changed)) != before[name]:
                return None
        return ".".join(path)

    # Helm's own, and a choice of one.
    rest = [leaf for leaf in leaves(defaults) if leaf[0] != ("global",)]
    single = [".".join(path) for path, _ in rest if len(schema_of(path).get("enum", [0, 1])) == 1]
    assert all(name.endswith("autoscaling.metric") for name in single), single
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        idle = [name for name in pool.map(judge, rest) if name and name not in single]
    assert not idle, f"values without an effect: {idle}"


@check
def long_names_stay_within_what_kubernetes_and_redis_take():
    release, namespace = "r" * 53, "n" * 63
    answer = helm("template", release, CHART, "--namespace", namespace, "--values", values_file("gpu"))
    assert answer.returncode == 0, answer.stderr
    objects = [each for each in yaml.load_all(answer.stdout, Loader=LOADER) if each]
    names = [each["metadata"]["name"] for each in objects]
    # A pod's and a revision's name add eleven characters to a StatefulSet's.
    sets = [each["metadata"]["name"] for each in objects if each["kind"] == "StatefulSet"]
    assert max(map(len, names)) <= 63 and max(map(len, sets)) <= 52, names
    (prefix,) = re.findall(r'^ *namespace = "(.*)"$', answer.stdout, re.MULTILINE)
    assert len(prefix) == 64, prefix
    other = helm("template", release, CHART, "--namespace", namespace[:-1] + "m", "--values", values_file("gpu"))
    assert f'namespace = "{prefix}"' not in other.stdout, "two releases share a prefix in Redis"


@check
def the_versions_of_chart_and_workspace_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    manifest = (pathlib.Path(CHART).parents[2] / "Cargo.toml").read_text()
    version = manifest.split("[workspace.package]")[1].split('version = "')[1].split('"')[0]
    assert chart["appVersion"] == version, f"{chart['appVersion']} and {version}"
