"""What stands behind a command line, read from its words and from scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_provisioner.facilities.environment.facts import wrappers
from sandbox_provisioner.facilities.environment.facts.wrappers import Behind, find_behind
from sandbox_provisioner.python_files import Found, Reader

READER = Reader(())


def program(path: Path, text: str = "\x7fELF") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    return program(tmp_path / "env/bin/python")


def behind(*words: str, reader: Reader = READER, **environment: str) -> Behind:
    found = wrappers.which(words[0], environment)
    assert found, words
    return find_behind(found, words[1:], environment, reader)


def programs(*words: str, **environment: str) -> list[str]:
    return [command.program for command in behind(*words, **environment).commands]


@pytest.mark.parametrize(
    "words",
    [
        "env {python} -m x", "env -i A=b {python}", "env PATH={bin} python -I",
        "nice -n 10 {python}", "nohup nice {python}", "timeout --signal INT 60 {python}",
        "taskset -c 0-3 {python}", "bash -c {quoted}", "bash -lc {quoted}",
        "bash --login -c {quoted}", "sh -ec {quoted}",
    ],
)  # fmt: skip
def test_the_program_behind_a_wrapper_is_found(python: str, words: str) -> None:
    places = {"python": python, "quoted": "QUOTED", "bin": os.path.dirname(python)}
    split = words.format(**places).split()
    split = [f"cd /tmp && exec {python} -m x" if word == "QUOTED" else word for word in split]
    found = behind(*split)
    assert found.commands[-1].program == python


def test_a_wrapper_that_is_not_known_names_its_program(tmp_path: Path, python: str) -> None:
    """As nb_conda_kernels does, and what a site has of its own."""
    wrapper = program(tmp_path / "own/wrap")
    (tmp_path / "conda/conda-meta").mkdir(parents=True)
    found = behind(wrapper, "-x", f"{tmp_path}/conda", python, "-m", "ipykernel_launcher")
    assert [command.program for command in found.commands] == [wrapper, python]
    assert Found(f"{tmp_path}/conda") in found.files


@pytest.mark.parametrize(
    "text",
    ['exec "$@"', 'exec nice "$@"', "shift\nexec $@", 'exec "$1" -m x', '. {0}/inner.sh'],
)  # fmt: skip
def test_the_arguments_of_a_script_are_what_it_runs(tmp_path: Path, python: str, text: str) -> None:
    (tmp_path / "inner.sh").write_text('exec "$@"\n')
    text = f"#!/bin/bash\nmodule load python\n{text.format(tmp_path)}\n"
    script = program(tmp_path / "kernel-helper.sh", text)
    first = ["x"] if "shift" in text else []
    name = os.path.basename(python)
    assert programs(script, *first, name, PATH=f"{os.path.dirname(python)}:/bin")[-1] == python
    assert programs("bash", "-c", 'exec "$@"', "name", python)[-1] == python


SCRIPTS = {
    "plain": 'exec {python} -m ipykernel_launcher "$@"',
    "variable": 'HERE={prefix}\nexec "$HERE/bin/python" -m x',
    "export": "export PATH={prefix}/bin:$PATH\npython -m x",
    "beside": '"$(dirname "$0")/env/bin/python" -m x',
    "resolved": 'D=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)\n$D/env/bin/python',
    "real path": 'd=$(dirname "$(readlink -f "$0")")\nexec ${{d}}/env/bin/python',
    "activate": "source {prefix}/bin/activate\nexec python",
    "dot": ". {prefix}/bin/activate && python",
    "default": "${{NOT_SET:-{prefix}}}/bin/python",
    "condition": "if true; then\n  {python} -m x > /dev/null 2>&1\nfi",
    "function": "run() {{ nice {python} \"$@\"; }}\nrun 'it'",
    "continued": "exec \\\n  {python} \\\n  -m x",
    "inner": ". {prefix}/../settings.sh\n$PYTHON -m x",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_is_read(tmp_path: Path, python: str, kind: str) -> None:
    prefix = Path(python).parents[1]
    (prefix / "bin/activate").touch()
    (tmp_path / "settings.sh").write_text(f"PYTHON={python}\n")
    text = SCRIPTS[kind].format(python=python, prefix=prefix)
    script = program(tmp_path / "launch.sh", f"#!/bin/bash\n# {prefix}\nset -e\n{text}\n")
    assert python in programs(script)
    assert Found(script) in behind("bash", script).files


@pytest.mark.parametrize(
    "text",
    [
        "source {root}/bin/activate lab\npython",
        "source {root}/etc/profile.d/conda.sh\nconda activate lab\nexec python",
        "{root}/bin/conda run -n lab --no-capture-output python",
        "{root}/bin/conda run --prefix={root}/envs/lab python",
        "PATH={root}/bin:$PATH\nconda run -n lab python",
    ],
)  # fmt: skip
def test_environments_of_conda_are_followed(tmp_path: Path, text: str) -> None:
    root = tmp_path / "conda"
    (root / "conda-meta").mkdir(parents=True)
    (root / "etc/profile.d").mkdir(parents=True)
    program(root / "bin/conda")
    (root / "bin/activate").touch()
    (root / "etc/profile.d/conda.sh").touch()
    inner = program(root / "envs/lab/bin/python")
    script = program(tmp_path / "launch.sh", f"#!/bin/bash\n{text.format(root=root)}\n")
    found = behind(script)
    assert found.commands[-1].program == inner
    assert Found(f"{root}/envs/lab") in found.files


def test_variables_are_those_that_the_wrapper_sets(tmp_path: Path, python: str) -> None:
    text = f"#!/bin/sh\nexport LD_LIBRARY_PATH=/opt/lib:$LD_LIBRARY_PATH\nX=1 exec {python}\n"
    script = program(tmp_path / "launch.sh", text)
    environment = behind(script, LD_LIBRARY_PATH="/usr/more").commands[-1].environment
    assert environment["LD_LIBRARY_PATH"] == "/opt/lib:/usr/more"
    assert environment["X"] == "1"


def test_what_a_script_says_that_a_kernel_may_write_is_not_trusted(
    tmp_path: Path, python: str
) -> None:
    script = program(tmp_path / "work/launch.sh", f"#!/bin/sh\nexec {python}\n")
    reader = Reader((str(tmp_path / "work"),))
    first, *inner = behind(script, reader=reader).commands
    assert first.trusted
    assert [(command.program, command.trusted) for command in inner] == [
        ("/bin/sh", False), (python, False),
    ]  # fmt: skip


def test_paths_that_are_named_for_whatever_reason_are_noted(tmp_path: Path) -> None:
    script = program(
        tmp_path / "l.sh", "#!/bin/sh\nLICENCE=/opt/licence/key do-it # /opt/comment\n"
    )
    assert behind(script).named == ["/opt/licence/key"]


@pytest.mark.parametrize(
    "text",
    ["exec $0", '"', "'$(", "$(($(($((", "$(dirname", "source", ". .", "env", "A=", "nice -n",
     "&& ;;", "exec bash $0", ". $0;" * 99, "{" * 999, "$(" * 500 + ")" * 500, "\x00", "bash -c",
     "a=$a$a;" * 99, "bash -c 'bash -c $0'" * 99],
)  # fmt: skip
def test_no_text_makes_the_search_long_or_fail(tmp_path: Path, text: str) -> None:
    script = program(tmp_path / "launch.sh", f"#!/bin/bash\n{text}\n{text}\n")
    assert len(programs(script)) <= 64


def test_a_text_that_grows_is_bounded(tmp_path: Path) -> None:
    lines = "\n".join(["A=xxxxxxxxxxxxxxxx", *["A=$A$A"] * 60])
    script = program(tmp_path / "launch.sh", f"#!/bin/bash\n{lines}\n")
    assert programs(script)[0] == script


@pytest.mark.parametrize("text", ["a;" * 40_000, ". $0\n" * 9000, "nice a b c d e f g;" * 3000])
def test_a_long_script_costs_few_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    looks: list[str] = []
    there = os.path.isfile

    def look(path: str) -> bool:
        looks.append(path)
        return there(path)

    monkeypatch.setattr(os.path, "isfile", look)
    programs(program(tmp_path / "launch.sh", f"#!/bin/bash\n{text}\n"), PATH="/one:/two")
    assert len(looks) < 3000
