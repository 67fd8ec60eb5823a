"""wrappers.py - reads only, whoever launches: which programs stand behind a kernel's command line.

A kernel.json may name a shell, ``env``, ``nice``, ``conda run``, or a script that in the end runs
the interpreter. Nothing is run to find that out. Words are split as a shell splits them, scripts
are read, and what they set, activate and call is followed::

    #!/bin/bash
    source /opt/conda/bin/activate lab      ──▶ /opt/conda/envs/lab, its bin first on PATH
    export LD_LIBRARY_PATH=/opt/cuda/lib    ──▶ for what comes after it
    exec python "$(dirname "$0")/run.py"    ──▶ that environment's python, the file beside it

What only a run would tell (functions, loops, ``module load``, what a program prints) is passed
over: then the kernel has what was found, and the person is told what else its command names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sandbox_provisioner.links import real_path
from sandbox_provisioner.python_files import Found, Reader, read_start

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_MOST_COMMANDS = 64
_MOST_NAMED = 256
_MOST_READS = 8
_MOST_LINES = 4000
_MOST_LOOKUPS = 1000
_LONGEST_WORD = 4096
_DEEPEST = 8
# What runs the rest of its own command line, behind options.
_PREFIXES = {
    "builtin", "chrt", "command", "env", "exec", "ionice", "nice", "nohup", "numactl", "prlimit",
    "setsid", "stdbuf", "taskset", "time", "timeout",
}  # fmt: skip
_SHELLS = {"ash", "bash", "dash", "ksh", "sh", "zsh"}
_CONDAS = {"conda", "mamba", "micromamba"}
_KEYWORDS = {"!", "do", "elif", "else", "if", "then", "until", "while", "{"}
_DECLARES = {"declare", "export", "local", "readonly", "typeset"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.ASCII | re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?[-=]([^}]*))?\})", re.ASCII)
_OWN_PATH = re.compile(r"\$(?:0|\{0\}|BASH_SOURCE|\{BASH_SOURCE(?:\[0\])?\})", re.ASCII)
_OWN_FOLDER = re.compile(r"\$\{(?:0|BASH_SOURCE(?:\[0\])?)%/\*\}", re.ASCII)
_PATH = re.compile(r"(?<![\w.~])/[\w.+@%/-]+")
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")


@dataclass(frozen=True, slots=True)
class Command:
    """A program's path, its arguments and variables; *trusted* as of `Found`."""

    program: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    trusted: bool = True


@dataclass(slots=True)
class Behind:
    """What a command line runs, itself first; *files* that are read or activated on the way; and
    all paths that are *named* in them, whatever for."""

    commands: list[Command] = field(default_factory=list)
    files: list[Found] = field(default_factory=list)
    named: list[str] = field(default_factory=list)


def find_behind(
    program: str, words: Sequence[str], environment: Mapping[str, str], reader: Reader
) -> Behind:
    """Follow *program* with the arguments *words*."""
    search = _Search(reader)
    search.follow((program, *words), environment)
    # Of a wrapper that is not known, such as nb_conda_kernels'.
    for number, word in enumerate(words):
        if word.startswith("/") and os.path.isdir(f"{word}/conda-meta"):
            search.behind.files.append(Found(word))
        elif os.path.basename(os.path.dirname(word)) == "bin" and which(word, environment):
            search.follow(words[number:], environment)
            break
    return search.behind


def candidates(name: str, environment: Mapping[str, str]) -> list[str]:
    """Where the program *name* may be. An empty or relative entry of PATH means the directory that
    the server happens to run in, which is not the kernel's: it is passed over."""
    if "/" in name:
        return [name]
    folders = environment.get("PATH", DEFAULT_PATH).split(os.pathsep)
    return [os.path.join(folder, name) for folder in folders if folder.startswith("/")]


def which(name: str, environment: Mapping[str, str]) -> str:
    """The absolute path of the program *name*, "" if there is none."""
    if not name or "\0" in name:
        return ""
    for path in candidates(name, environment):
        if path.startswith("/") and os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.normpath(path)
    return ""


@dataclass(slots=True)
class _Shell:
    """What a shell knows that reads a text: the path of its script, its arguments, variables."""

    own: str
    arguments: tuple[str, ...]
    variables: dict[str, str]

    def words_of(self, words: Sequence[str]) -> list[str]:
        """*words* with what is put in for variables and arguments."""
        found: list[str] = []
        for word in words:
            everything = word in {"$@", "$*", "${@}", "${*}"}
            found += self.arguments if everything else [_expanded(word, self._known)]
        return found

    @property
    def _known(self) -> dict[str, str]:
        numbered = {str(number): word for number, word in enumerate(self.arguments[:9], 1)}
        return self.variables | numbered


class _Search:
    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.behind = Behind()
        self.conda_root = ""
        self.reads = self.lines = self.lookups = 0
        self.depth = 0

    def follow(
        self, words: Sequence[str], environment: Mapping[str, str], trusted: bool = True
    ) -> None:
        """Note the command *words*, and go on with what it runs."""
        program = self._which(words[0], environment) if words else ""
        full = len(self.behind.commands) >= _MOST_COMMANDS or self.depth >= _DEEPEST
        if full or not program:
            return
        self.behind.commands.append(Command(program, tuple(words[1:]), environment, trusted))
        self.depth += 1
        name, rest = os.path.basename(program), words[1:]
        if name in _PREFIXES:
            self._prefix(rest, environment, trusted)
        elif name in _SHELLS:
            self._shell(rest, environment, trusted)
        else:
            self._script(program, rest, environment, trusted)
            if name in _CONDAS and rest and rest[0] == "run":
                self._conda_run(program, rest[1:], environment, trusted)
        self.depth -= 1

    def _which(self, name: str, environment: Mapping[str, str]) -> str:
        self.lookups += 1
        return which(name, environment) if self.lookups <= _MOST_LOOKUPS else ""

    def _prefix(self, words: Sequence[str], environment: Mapping[str, str], trusted: bool) -> None:
        """Options of such a program may have values; the first word that is a program counts."""
        variables = dict(environment)
        for number, word in enumerate(words):
            if found := _ASSIGNMENT.fullmatch(word):
                variables[found[1]] = found[2]
            elif not word.startswith("-") and self._which(word, variables):
                self.follow(words[number:], variables, trusted)
                return

    def _script(
        self, program: str, words: Sequence[str], environment: Mapping[str, str], trusted: bool
    ) -> None:
        """execve(2): whoever "#!" names is run, with the script's path."""
        line = read_start(program, 256).partition(b"\n")[0]
        if line.startswith(b"#!") and b"\0" not in line:
            named = os.fsdecode(line[2:]).split()
            trusted = self.reader.trusts(program, trusted)
            self.follow((*named, program, *words), environment, trusted)

    def _shell(self, words: Sequence[str], environment: Mapping[str, str], trusted: bool) -> None:
        left = iter(words)
        for word in left:
            if word in {"-o", "-O", "+o", "+O", "--rcfile", "--init-file"}:
                next(left, "")
            elif re.fullmatch(r"-[a-z]*c[a-z]*", word):
                text, own = next(left, ""), next(left, "")
                self._text(text, _Shell(own, tuple(left), dict(environment)), trusted)
                return
            elif not word.startswith(("-", "+")):
                self._read(word, _Shell(word, tuple(left), dict(environment)), trusted)
                return

    def _read(self, path: str, shell: _Shell, trusted: bool) -> None:
        """The text of the script *path*, which changes what *shell* knows."""
        if self.reads >= _MOST_READS or not path.startswith("/") or not os.path.isfile(path):
            return
        self.reads += 1
        self.behind.files.append(Found(path, trusted))
        text = "\n".join(self.reader.lines_of(path))
        self._text(text, shell, self.reader.trusts(path, trusted))

    def _text(self, text: str, shell: _Shell, trusted: bool) -> None:
        if self.depth >= _DEEPEST:
            return
        self.depth += 1
        shell.variables.pop("HOME", None)  # inside it is another one
        for line in text.replace("\\\n", " ").split("\n"):
            self.lines += 1
            if self.lines > _MOST_LINES:
                break
            known = _substituted(line, shell.own, shell.variables)
            self._note_paths(_expanded(known.partition("#")[0], shell.variables))
            for words in _simple_commands(known):
                self._simple(shell.words_of(words), shell, trusted)
        self.depth -= 1

    def _note_paths(self, line: str) -> None:
        room = _MOST_NAMED - len(self.behind.named)
        self.behind.named += _PATH.findall(line)[:room]

    def _simple(self, words: list[str], shell: _Shell, trusted: bool) -> None:
        """One command of a shell, without keywords before it."""
        while words and words[0] in _KEYWORDS:
            words = words[1:]
        if words and words[0] in _DECLARES:
            words = [word for word in words[1:] if not word.startswith("-")]
        variables = shell.variables
        own = dict(variables)
        while words and (found := _ASSIGNMENT.fullmatch(words[0])):
            own[found[1]], words = found[2], words[1:]
        if not words:
            variables.update(own)
        elif words[0] == "shift":
            shell.arguments = shell.arguments[1:]
        elif words[0] in {"source", "."} and self.reads < _MOST_READS:
            self._source(words[1:], shell, trusted)
        elif words[0] in _CONDAS and words[1:2] == ["activate"] and self.conda_root:
            self._activate(self._conda_prefix(self.conda_root, words[2:3]), variables, trusted)
        elif words[0] in _PREFIXES:
            self._prefix(words[1:], own, trusted)
        else:
            self.follow(words, own, trusted)

    def _source(self, words: list[str], shell: _Shell, trusted: bool) -> None:
        variables = shell.variables
        path = _sourced(words[0], variables) if words else ""
        prefix = os.path.dirname(os.path.dirname(path))
        if path.endswith("/etc/profile.d/conda.sh"):
            self.conda_root = os.path.dirname(prefix)
            self.behind.files.append(Found(self.conda_root, trusted))
        elif path.endswith("/bin/activate") and os.path.isdir(f"{prefix}/conda-meta"):
            self.conda_root = prefix
            self.behind.files.append(Found(prefix, trusted))
            self._activate(self._conda_prefix(prefix, words[1:2]), variables, trusted)
        elif path.endswith("/bin/activate"):
            self._activate(prefix, variables, trusted)
        else:
            self._read(path, _Shell(path, shell.arguments, variables), trusted)

    def _activate(self, prefix: str, variables: dict[str, str], trusted: bool) -> None:
        self.behind.files.append(Found(prefix, trusted))
        path = variables.get("PATH", DEFAULT_PATH)
        variables |= {"PATH": f"{prefix}/bin:{path}", "CONDA_PREFIX": prefix}

    def _conda_run(
        self, program: str, words: Sequence[str], environment: Mapping[str, str], trusted: bool
    ) -> None:
        """``conda run -n NAME`` or ``-p PREFIX``, flags, and the command."""
        root = os.path.dirname(os.path.dirname(real_path(program)))
        variables, prefix = dict(environment), root
        left = list(words)
        while left and left[0].startswith("-"):
            option, equals, value = left.pop(0).partition("=")
            if option in {"-n", "--name", "-p", "--prefix", "--cwd"}:
                value = value if equals else (left.pop(0) if left else "")
            if option in {"-n", "--name"}:
                prefix = self._conda_prefix(root, [value])
            elif option in {"-p", "--prefix"}:
                prefix = value
        self._activate(prefix, variables, trusted)
        self.follow(left, variables, trusted)

    def _conda_prefix(self, root: str, name: Sequence[str]) -> str:
        """The environment called *name*, which may be a path; the root's own without one."""
        if not name or name[0] == "base":
            return root
        return name[0] if name[0].startswith("/") else f"{root}/envs/{name[0]}"


def _sourced(name: str, variables: Mapping[str, str]) -> str:
    """bash(1): a file without a slash is looked for on PATH, and need not be executable."""
    if "/" in name:
        return name
    return next(filter(os.path.isfile, candidates(name, variables)), name)


# -- what a shell makes of a line


def _substituted(line: str, own: str, variables: Mapping[str, str]) -> str:
    """*line* of the script *own* with the few substitutions that tell where it lies."""
    line = _OWN_FOLDER.sub(lambda _: os.path.dirname(own), line)
    line = _OWN_PATH.sub(lambda _: own, line)
    for _ in range(_DEEPEST):
        line, count = _SUBSTITUTION.subn(lambda found: _answer(found[1], variables), line)
        if not count:
            break
    return line


def _answer(command: str, variables: Mapping[str, str]) -> str:
    words = [word for word in _split(command) if word != "--" and not word.startswith("-")]
    match words:
        case ["dirname", path]:
            return os.path.dirname(_expanded(path, variables))
        case ["readlink" | "realpath", path]:
            return real_path(_expanded(path, variables))
        case ["cd", path, *_, "pwd"]:
            return _expanded(path, variables)
        case ["which", name] | ["command", name]:
            return which(name, variables)
    return ""


def _simple_commands(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    tokens = iter(_split(line))
    for token in tokens:
        if token and set(token) <= set("();|&"):
            if words:
                yield words
            words = []
        elif token and set(token) <= set("<>&"):
            next(tokens, "")
        else:
            words.append(token)
    if words:
        yield words


def _split(text: str) -> list[str]:
    with contextlib.suppress(ValueError):  # a quotation that goes on in the next line
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        return list(lexer)
    return text.split()


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return variables.get(found[1] or found[2]) or found[3] or ""

    return _VARIABLE.sub(value, word, count=64)[:_LONGEST_WORD]
