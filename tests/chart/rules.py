"""The alerts: sound, explained, and each seen to fire and to stay silent."""

import pathlib
import re
import shutil
import tempfile

import yaml

from common import ROOT, Skip, check, need, one, profile, rendered, run, values_file

CASES = pathlib.Path(__file__).parent / "rules"
PROMTOOL = "Debian: prometheus"


def alerts():
    """The alerts of the profile that has everything."""
    groups = one(profile("gpu"), "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def written(folder, spec):
    """The rules as a file that promtool reads."""
    path = pathlib.Path(folder) / "rules.yaml"
    path.write_text(yaml.safe_dump(spec, width=1000))
    return path


@check
def promtool_takes_the_rules_of_every_profile_that_has_them():
    promtool = need("promtool", PROMTOOL)
    for name in ["gpu", "external-redis"]:
        with tempfile.TemporaryDirectory() as folder:
            path = written(folder, one(profile(name), "PrometheusRule")["spec"])
            answer = run(promtool, "check", "rules", "--lint-fatal", path)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            # The control: the same file with a bracket too few.
            path.write_text(path.read_text().replace("or vector(0))", "or vector(0)", 1))
            assert run(promtool, "check", "rules", path).returncode != 0


@check
def every_alert_fires_when_it_should_and_else_stays_silent():
    promtool = need("promtool", PROMTOOL)
    spec = one(profile("gpu"), "PrometheusRule")["spec"]
    # Cases compare all annotations; these two are text without values, and are checked below.
    for group in spec["groups"]:
        for rule in group["rules"]:
            rule["annotations"] = {"description": rule["annotations"]["description"]}
    with tempfile.TemporaryDirectory() as folder:
        written(folder, spec)
        files = sorted(CASES.glob("*.yaml"))
        for file in files:
            shutil.copy(file, folder)
        for file in files:
            answer = run(promtool, "test", "rules", file.name, cwd=folder)
            assert answer.returncode == 0, f"{file.name}: {answer.stdout}{answer.stderr}"


@check
def every_alert_has_a_case_that_fires_and_one_that_stays_silent():
    fires, silent = set(), set()
    for file in CASES.glob("*.yaml"):
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test.get("alert_rule_test", []):
                (fires if case.get("exp_alerts") else silent).add(case["alertname"])
    names = {rule["alert"] for rule in alerts()}
    assert fires == names, f"no case that fires, or no such alert: {fires ^ names}"
    assert silent == names, f"no case that stays silent, or no such alert: {silent ^ names}"


@check
def every_alert_says_what_it_means_and_where_the_runbook_is():
    for rule in alerts():
        name, annotations = rule["alert"], rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook"}, f"{name}: {sorted(annotations)}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical"), name
        assert len(annotations["summary"]) <= 80 and not annotations["summary"].endswith("."), name
        assert annotations["description"].endswith("."), name
        # A sentence to start with, and the place where the rest is.
        start = f"docs/operations.md#{name.lower()}: "
        assert annotations["runbook"].startswith(start) and annotations["runbook"].endswith("."), annotations["runbook"]


@check
def the_runbook_of_every_alert_is_there():
    text = (ROOT / "docs/operations.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    names = [rule["alert"] for rule in alerts()]
    missing = [name for name in names if name.lower() not in anchors]
    if missing == names:
        raise Skip("docs/operations.md does not describe the alerts yet")
    assert not missing, f"docs/operations.md has no heading for {missing}"


@check
def an_alert_about_redis_is_only_there_with_redis():
    with_rules = rendered("--values", values_file("minimal"), "--set", "monitoring.rules.enabled=true")
    names = [rule["alert"] for rule in one(with_rules, "PrometheusRule")["spec"]["groups"][0]["rules"]]
    assert "CacheClipStoreDown" in names and "CacheClipIndexDown" not in names, names


@check
def the_monitor_gives_the_labels_that_the_alerts_select_by():
    monitor = one(profile("gpu"), "ServiceMonitor")["spec"]
    relabel = monitor["endpoints"][0]["relabelings"][0]
    # Prometheus puts "_" for what is no letter in a label's name.
    label = re.sub(r"\W", "_", "app.kubernetes.io/component")
    assert relabel["sourceLabels"] == [f"__meta_kubernetes_service_label_{label}"] and relabel["targetLabel"] == "job"
    jobs = set()
    for service in [each for each in profile("gpu") if each["kind"] == "Service"]:
        labels, ports = service["metadata"]["labels"], {port["name"] for port in service["spec"]["ports"]}
        if "metrics" in ports:
            assert monitor["selector"]["matchLabels"].items() <= labels.items(), service["metadata"]["name"]
            jobs.add(relabel["replacement"].replace("${1}", labels["app.kubernetes.io/component"]))
    selected = set()
    for rule in alerts():
        for matcher, value in re.findall(r'job(=~|=)"([^"]*)"', rule["expr"]):
            chosen = {job for job in jobs if (job == value if matcher == "=" else re.fullmatch(value, job))}
            assert chosen, f"{rule['alert']} selects {value}, and there are {jobs}"
            selected |= chosen
    assert selected == jobs, f"no alert looks at {jobs - selected}"
