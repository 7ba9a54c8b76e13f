"""The image files, read and compared with the workspace and the chart; no container engine is needed."""

import fnmatch
import json
import pathlib
import re
import shlex
import shutil
import tempfile

import tomllib

from common import ROOT, Skip, check, one, profile, run

FOLDER = ROOT / "deploy/docker"
COMPONENTS = {
    "gateway": "Deployment",
    "gpu-worker": "Deployment",
    "aux-scorer": "Deployment",
    "cache-store": "StatefulSet",
}


def instructions(path):
    """The instructions of a Dockerfile as (name, words), continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def stages(path):
    """The arguments before the first stage, and each stage's instructions, its FROM first."""
    before, found = [], []
    for name, rest in instructions(path):
        if name == "FROM":
            found.append([])
        (found[-1] if found else before).append((name, rest))
    return before, found


def copies(stage):
    """The COPY instructions of a stage as (from, sources, destination)."""
    for name, rest in stage:
        if name == "COPY":
            words = shlex.split(rest)
            flags = [word for word in words if word.startswith("--")]
            sources = [word for word in words if not word.startswith("--")]
            origin = next((flag.split("=", 1)[1] for flag in flags if flag.startswith("--from=")), None)
            yield origin, sources[:-1], sources[-1]


def each():
    """Every image file with its component."""
    for component in COMPONENTS:
        yield component, FOLDER / f"{component}.Dockerfile"


def chosen(path, source):
    """Whether the list beside the Dockerfile lets a source into the build."""
    let = False
    for line in path.with_name(path.name + ".dockerignore").read_text().splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if fnmatch.fnmatch(source, pattern) or source.startswith(pattern + "/"):
                let = line.startswith("!")
    return let


@check
def there_is_one_image_file_per_service():
    assert {path.name for path in FOLDER.glob("*.Dockerfile")} == {f"{name}.Dockerfile" for name in COMPONENTS}


@check
def what_an_image_copies_is_there():
    for component, path in each():
        _, built = stages(path)
        names = {re.search(r" AS (\S+)", f" {stage[0][1]}").group(1) for stage in built[:-1]}
        for stage in built:
            for origin, sources, _ in copies(stage):
                if origin is not None:
                    assert origin in names, f"{path.name}: there is no stage {origin}"
                    continue
                for source in sources:
                    assert (ROOT / source).exists(), f"{path.name}: {source} is not in the repository"
                    assert chosen(path, source), f"{path.name}: {source} is kept out by .dockerignore"
        assert not chosen(path, "target/release") and not chosen(path, ".git/config"), path.name
        # The binary comes out of the stage that built it, from where that stage put it.
        taken = [source for origin, sources, _ in copies(built[-1]) if origin == "build" for source in sources]
        assert f"/out/cacheclip-{component}" in taken, f"{path.name}: {taken}"


@check
def an_image_is_not_root_and_starts_the_binary_that_it_built():
    packages = json.loads(run("cargo", "metadata", "--no-deps", "--offline", "--format-version", "1", cwd=ROOT).stdout)
    binaries = {
        target["name"]: package["name"]
        for package in packages["packages"]
        for target in package["targets"]
        if "bin" in target["kind"]
    }
    for component, path in each():
        _, built = stages(path)
        last = dict(built[-1])
        assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", last["USER"]), f"{path.name}: USER {last['USER']}"
        pod = one(profile("default"), COMPONENTS[component], component)["spec"]["template"]["spec"]
        security = pod["securityContext"]
        assert last["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}", path.name
        # A chart that named a command would pass the image's by.
        container = pod["containers"][0]
        assert "command" not in container
        (entry,) = json.loads(last["ENTRYPOINT"])
        binary = entry.rsplit("/", 1)[1]
        assert binary in binaries, f"{path.name}: {binary} is no binary of the workspace"
        command = next(rest for name, rest in built[-2] if name == "RUN" and "cargo build" in rest)
        assert f"-p {binaries[binary]} --bin {binary}" in command and "--locked" in command, command
        assert (["/out/" + binary], entry) in [(sources, into) for _, sources, into in copies(built[-1])], path.name
        # And what the chart says about the image.
        assert container["image"].split(":")[0] == binary, container["image"]
        ports = {str(port["containerPort"]) for port in container["ports"]}
        assert set(last["EXPOSE"].split()) == ports, f"{path.name}: {last['EXPOSE']} and {ports}"


@check
def what_an_image_can_be_built_with_are_features_of_its_package():
    packages = json.loads(run("cargo", "metadata", "--no-deps", "--offline", "--format-version", "1", cwd=ROOT).stdout)
    features = {package["name"]: set(package["features"]) for package in packages["packages"]}
    for component, path in each():
        # Those the build names, and those that the text above it says to give.
        text = path.read_text()
        named = re.findall(r'--features "?([\w,]+)', text) + re.findall(r"--build-arg FEATURES=([\w,]+)", text)
        named = {name for names in named for name in names.split(",") if name}
        assert named, f"{path.name} names no feature"
        assert named <= features[f"cacheclip-{component}"], f"{path.name}: {named}"


@check
def every_base_image_has_a_default_and_can_be_replaced():
    for _, path in each():
        before, built = stages(path)
        defaults = dict(rest.split("=", 1) for name, rest in before if name == "ARG")
        for stage in built:
            base = stage[0][1].split()[0]
            argument = re.fullmatch(r"\$\{(\w+)\}", base)
            assert argument and defaults.get(argument.group(1)), f"{path.name}: FROM {base}"
            value = defaults[argument.group(1)]
            inner = re.fullmatch(r"\$\{(\w+)\}", value)
            value = defaults[inner.group(1)] if inner else value
            assert re.search(r":[^:]*\d", value) or "-" in value.split(":")[-1], f"{path.name}: {value} has no version"
        for wanted in ["CUDA_IMAGE"] if path.name.startswith("gpu-worker") else ["RUNTIME_IMAGE"]:
            assert wanted in defaults, f"{path.name}: no build argument {wanted}"


@check
def the_compiler_of_the_images_is_the_one_the_workspace_asks_for():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["rust-version"]
    for _, path in each():
        defaults = dict(rest.split("=", 1) for name, rest in stages(path)[0] if name == "ARG")
        found = re.fullmatch(r"rust:(\d+\.\d+)-\w+", defaults["RUST_IMAGE"]).group(1)
        assert tuple(map(int, found.split("."))) >= tuple(map(int, version.split("."))), f"{path.name}: {found}"


@check
def the_bundled_models_are_where_the_chart_looks_for_them():
    for component, path in each():
        _, built = stages(path)
        there = {into.rstrip("/"): sources for origin, sources, into in copies(built[-1]) if origin is None}
        config = tomllib.loads(one(profile("default"), "ConfigMap", component)["data"]["config.toml"])
        wanted = [config["model_dir"]] if "model_dir" in config else []
        assert list(there) == wanted, f"{path.name}: {list(there)} and {wanted}"
        for sources in there.values():
            names = set()
            for source in map(ROOT.joinpath, sources):
                names |= {file.name for file in source.iterdir()} if source.is_dir() else {source.name}
            assert {"config.json", "tokenizer.json", "prompt.json"} <= names, names
            assert ("model.safetensors" in names) == (component != "gateway"), f"{path.name}: {names}"


@check
def what_an_image_copies_is_a_workspace_that_cargo_can_build():
    for _, path in each():
        _, built = stages(path)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for origin, sources, into in copies(built[-2]):
                for source in sources if origin is None else []:
                    target = folder / (source if into in (".", "./") else into)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if (ROOT / source).is_dir():
                        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("target"))
                    else:
                        shutil.copy(ROOT / source, target)
            # Of one platform: crates for others are never downloaded.
            platform = ["--filter-platform", "x86_64-unknown-linux-gnu"]
            arguments = ["cargo", "metadata", "--offline", "--locked", "--format-version", "1", *platform]
            answer = run(*arguments, cwd=folder)
            if "--offline" in answer.stderr and "download" in answer.stderr:
                raise Skip("the crates have not been downloaded here")
            assert answer.returncode == 0, f"{path.name}: {answer.stderr}"
            # The control: a member of the workspace left out is noticed.
            shutil.rmtree(folder / "tests")
            assert run(*arguments, cwd=folder).returncode != 0, f"{path.name}: tests were not missed"
