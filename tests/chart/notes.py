"""What an installation prints. helm prints it only with a cluster, so it is rendered here as a field of an object."""

import pathlib
import shutil
import tempfile

import yaml

from common import CHART, NAMESPACE, PROFILES, RELEASE, check, helm, values_file


def notes(*arguments):
    """The notes for some arguments."""
    with tempfile.TemporaryDirectory() as folder:
        chart = pathlib.Path(folder) / "cacheclip"
        shutil.copytree(CHART, chart)
        text = (chart / "templates/NOTES.txt").read_text()
        (chart / "templates/_notes.tpl").write_text('{{- define "notes" -}}\n' + text + "\n{{- end -}}\n")
        (chart / "templates/notes.yaml").write_text('notes: {{ include "notes" . | toJson }}\n')
        shown = ["--show-only", "templates/notes.yaml"]
        answer = helm("template", RELEASE, chart, "--namespace", NAMESPACE, *shown, *arguments)
    assert answer.returncode == 0, answer.stderr
    return yaml.safe_load(answer.stdout)["notes"]


# What the notes say, and in which profiles.
SAYS = {
    "cc-cacheclip-gateway.rag.svc:7070": set(PROFILES),
    "kubectl --namespace rag port-forward service/cc-cacheclip-gateway 7070": set(PROFILES),
    "The scope secret is in the Secret cc-cacheclip-scope": {"default", "minimal"},
    "The models are the small pair": {"default", "minimal"},
    "WARNING: networkPolicy is off": {"minimal"},
    "Metrics are on port 9090": {"default", "minimal"},
}


@check
def the_notes_say_what_holds_for_the_values():
    for profile in PROFILES:
        text = notes("--values", values_file(profile))
        for says, where in SAYS.items():
            assert (says in text) == (profile in where), f"{profile}: {says!r} in {text}"
        assert max(map(len, text.splitlines())) <= 120 and "\n\n\n" not in text, text
    without = notes("--values", values_file("default"), "--set", "redis.enabled=false")
    assert "There are 2 stores and no Redis" in without, without
