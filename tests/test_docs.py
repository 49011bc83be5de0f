"""What the pages say to type: every command and every block of Python of README, CONTRIBUTING and docs, from the text.

Commands that train run to the end of the pre-flight: flags, config, data's shape, what bridges maps, every schedule.
Data that would have to be downloaded are stood in for by black images of their shape. Notebooks run where the pages are
built.
"""

import argparse
import re
import runpy
import shlex
import shutil
import sys
import tomllib

import jax
import numpy as np
import pytest
from helpers import ROOT, small_config, smallest_networks

import gompertz_jax as gj
from gompertz_jax import cli, cohort, compare
from gompertz_jax.models import create, tensor_files, torch_layouts
from gompertz_jax.objective import check_objective
from gompertz_jax.training import loop
from gompertz_jax.training.data import Dataset, load, of_config
from gompertz_jax.training.images import Split
from gompertz_jax.training.objectives import build_objective

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
# What is not ours to run, and why.
ELSEWHERE = {
    ". .venv/bin/activate": "a shell's",
    "pip install 'jax[k8s]'": "JAX's",
    "pip install onnx onnx-ir onnxruntime equinox dm-pix && pip install --no-deps jax2onnx": "export_onnx says it",
    "tfds build svhn_cropped --file_format=array_record": "TFDS's",
    "cd checkpoints/STEP && sha256sum -c SHA256SUMS": "the system's",
}
BEGINS = r"(?:[A-Z_]+=\S+ )*(?:python3? |gompertz-jax |make |pip |srun |gcloud |tfds |cd |\. |host\d\$ )"


def blocks_of(text):
    """The language and the text of every fenced block, and what is left of the page."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return fence.findall(text), fence.sub("", text)


def commands_of(text):
    """What a reader would type: blocks without a language, blocks by indentation, and code in a line."""
    fenced, rest = blocks_of(text)
    blocks = [block for language, block in fenced if not language]
    blocks += re.findall(r"^ {4}\S.*(?:\n {4}.*)*", rest, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", rest)
    return [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines if re.match(BEGINS, line)]


DESCRIBED = set()  # configs whose pre-flight has run: pages start the same one in several ways
EVERY = {command: page.name for page in reversed(PAGES) for command in commands_of(page.read_text())}
TUNED = """
from configs import digits


def get_config():
    config = digits.get_config()
    config.objective.terms.kd.weight = {weight!r}
    return config
"""


class Reached(Exception):
    """The command has passed everything that comes before weights are drawn and files are written."""


def stand_in(data):
    """The digits; in place of anything else, black images of its shape."""
    if data["name"] == "digits":
        return of_config(data)
    side = data["image_size"] or (64 if data["name"].startswith("folder") else 32)
    classes = 100 if data["name"] == "cifar100" else 10
    count = data["train_images"] or 50_000 - data["validation"]

    def black(count):
        return Split(np.broadcast_to(np.zeros((), np.uint8), (count, side, side, 3)), np.zeros(count, np.int32))

    names = tuple(map(str, range(classes)))
    return Dataset(data["name"], classes, black(count), black(data["validation"]), (0.5,) * 3, (0.2,) * 3, names, list)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder as a reader has it after the commands of the first pages: a clone, a run, an imported teacher."""
    place = tmp_path_factory.mktemp("room")
    for name in ("configs", "results", "docs", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(ROOT))
        loop.train_and_evaluate(small_config(), "runs/digits")
        shutil.copytree("runs/digits", "runs/cifar10")
        shutil.copytree(ROOT / "results" / "compare_digits", place / "runs" / "arms")
        shutil.copytree("runs/digits/teacher", "runs/tiny-tuning/teacher")
        (place / "runs" / "tuning" / "best").mkdir(parents=True)
        for name in ("matched", "gompertz"):
            source = TUNED.format(weight=f"{len(name)} * curve")
            (place / "runs" / "tuning" / "best" / f"{name}.py").write_text(source)
        network = create("resnet56", num_classes=100, key=jax.random.key(0))
        tensor_files.write_torch(place / "resnet56.pth", torch_layouts.to_state_dict(network, "resnet56", {}))
        cli.main(shlex.split("import-torch resnet56.pth --model resnet56 --out teachers/resnet56"))
        yield place


@pytest.fixture
def typed(room, monkeypatch):
    """Type a command in that folder."""
    monkeypatch.chdir(room)
    monkeypatch.syspath_prepend(str(ROOT))

    def reached(*_, **__):
        raise Reached

    for module in (loop, cohort):
        monkeypatch.setattr(module, "of_config", stand_in)
        monkeypatch.setattr(module, "network_from", reached)  # what comes after the pre-flight
    for module in (loop, compare):
        monkeypatch.setattr(module, "finished_result", lambda *_: None)
    return lambda command: type_command(command, room, monkeypatch)


def type_command(command, place, monkeypatch):
    if command in ELSEWHERE:
        return
    if match := re.match(r"make (\w+)", command):
        assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif match := re.match(r"pip install '\.\[(\w+)\]'$", command):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert match[1] in extras
    elif match := re.search(r"python train\.py ([^\"]*)", command):
        train(shlex.split(match[1].replace("DIR", "data")))
    elif match := re.match(r"gompertz-jax (.*)", command):
        arguments = shlex.split(match[1].replace("DIR", "runs/digits"))
        if len(arguments) == 1:
            assert re.search(rf'"{arguments[0]}"', (ROOT / "gompertz_jax" / "cli.py").read_text())
        elif arguments[0] in ("compare", "tune"):
            monkeypatch.setattr(loop.preflight, "describe", lambda *_, **__: "")  # of every group: a run's
            with pytest.raises(Reached):
                cli.main(arguments)
        else:
            if arguments[0] == "import-torch":
                shutil.rmtree(place / "teachers")
            cli.main(arguments)
    elif match := re.match(r"python ((?:benchmarks|docs)/\w+\.py)(.*)", command):
        parse_only(match[1], shlex.split(match[2]), monkeypatch)
    elif match := re.match(r"(?:\.venv/bin/)?python -m pytest (.*)", command):
        files, _, words = match[1].partition(" -k ")
        assert named(files.split(), words.strip('"'))
    else:
        pytest.fail(f"no rule says how to try {command!r}: add one, or a reason to ELSEWHERE")


def train(arguments):
    """train.py's own flags by name, its config by the same reader, then the run to the end of its pre-flight."""
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "train.py").read_text()))
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    for name in known - {"distributed"}:
        parser.add_argument(f"--{name}")
    parsed, overrides = parser.parse_known_args(arguments)
    config = cli._config(parsed.config, overrides)
    if (told := config.to_json_best_effort()) in DESCRIBED:
        return
    DESCRIBED.add(told)
    with pytest.raises(Reached):
        loop.train_and_evaluate(config, parsed.workdir or "runs/new")


def parse_only(script, arguments, monkeypatch):
    """Run a script as far as its arguments, which it must know."""

    def parse(self, *_):
        known, unknown = self.parse_known_args(arguments)
        assert not unknown
        raise Reached(known)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Reached):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def named(files, words):
    """The tests of these files whose names `-k` would take."""
    names = [name for file in files for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)]
    return [name for name in names if any(word in name for word in words.split(" or "))]


def test_commands_of_a_page():
    text = (
        "```\nmake demo    # so\npython train.py --config A \\\n  --b\n```\n"
        "use `python -m pytest tests/x.py` or `x`\n\n"
        "```python\nmake no\n```\n"
    )
    assert commands_of(text) == ["make demo", "python train.py --config A --b", "python -m pytest tests/x.py"]
    assert len(EVERY) > 40


@pytest.mark.parametrize("command", EVERY, ids=lambda command: f"{EVERY[command]}: {command}"[:90])
def test_every_command_works_as_it_stands(typed, command):
    typed(command)


def test_every_test_that_a_page_names_is_there():
    told = set()
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", page.read_text()):
            if match := re.match(r"(tests/test_\w+\.py)(?: -k (.+))?$", " ".join(code.split())):
                told.add((match[1], (match[2] or "").strip('"')))
    assert len(told) > 25
    for file, words in told:
        assert named([file], words), (file, words)


def test_every_block_of_python_runs(room, monkeypatch):
    monkeypatch.chdir(room)
    smallest_networks()
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    image = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
    readme = {"batches": [{"image": image, "label": np.arange(4, dtype=np.int32)}]}
    given = {"README.md": readme, "devices.md": readme, "losses.md": {"config": config}}
    for page in PAGES:
        if page.name == "networks.md":  # tests/test_own_networks.py trains with each of its blocks
            continue
        namespace = given.get(page.name, {})
        for language, block in blocks_of(page.read_text())[0]:
            if language == "python":
                block = block.replace('"resnet20"', '"smallest_wide"').replace('"resnet8"', '"smallest"')
                if page.name == "devices.md":
                    namespace["batch"] = namespace["batches"][0]
                exec(block, namespace)
        if page.name == "own_data.md":
            assert load("arrays:mine.npz", validation=180).train.images.shape == (1220, 8, 8, 1)
        if page.name == "losses.md":
            assert "at" in [term.name for term in build_objective(config, 100).terms]
        if page.name == "step.md":
            check_objective(namespace["objective"])
        if page.name == "reading.md":
            assert namespace["accuracy"]
    assert int(readme["state"].step) == 2 and np.isfinite(readme["metrics"]["loss"]).all()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_the_api_pages_have_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    written = re.findall("^::: (.*)", pages, re.MULTILINE)
    for name in dir(gj):
        module = getattr(getattr(gj, name), "__module__", None)
        if not name.startswith("_") and module and module.startswith("gompertz_jax"):
            assert module in written, f"{name} of {module}"


def test_pictures_are_those_of_the_code():
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    for name in ("curve", "objective"):
        assert drawn[name]().axes and (ROOT / "docs" / f"{name}.png").exists()
