"""PTX text to a list of instructions. Registers become numbers, labels become positions, scopes are resolved."""

import dataclasses
import re
from typing import Any

from .errors import EmulatorError

# A comment of LLVM that matters: it declares a register's value to be undefined on purpose.
IMPLICIT_DEF = re.compile(r"//\s*implicit-def:\s*(%[\w$]+)[^\n]*")
TOKEN = re.compile(r"[ \t]*([%A-Za-z_$][\w$]*)[ \t]*:(?!:)|([;{}\n])|([^;{}\n:]+|::?)")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\b[^,)]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*(?=[,)])"
)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[bufs](\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?")
WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


@dataclasses.dataclass(eq=False)
class Instruction:
    position: int
    line: int
    text: str
    predicate: int | None  # register number
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: list[str]  # register names are unique (scopes are resolved)
    target: int = -1  # of a branch


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    array: int  # bytes of a by-value struct (a tensor map), 0 for scalars


class Kernel:
    """One entry of a PTX module. `entry` is a part of its name; without it the module must have exactly one."""

    def __init__(self, text: str, entry: str | None = None) -> None:
        text = IMPLICIT_DEF.sub(r"implicit_def \1;", text)
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        found = [m for m in ENTRY.finditer(text) if entry is None or entry in m[1]]
        if len(found) != 1:
            raise EmulatorError(f"PTX has {len(found)} entries named {entry or '(any)'}, one expected")
        start = found[0].start()
        self.name = found[0][1]
        body = text.index("{", start)
        header = text[start:body]
        self.parameters = [Parameter(m[2], m[1], int(m[3] or 0)) for m in PARAM.finditer(header)]
        if len(self.parameters) != header.count(".param"):
            raise EmulatorError(f"parameters of {self.name} not understood: {header}")
        self.required_block = [int(x) for x in _directive(header, ".reqntid")]
        self.maximum_block = [int(x) for x in _directive(header, ".maxntid")]
        self.registers: dict[str, tuple[int, int]] = {}  # name -> number, width in bits
        self.shared: dict[str, tuple[int, int]] = {}  # name -> alignment, bytes (0: the dynamic part)
        for m in SHARED.finditer(text[: next(ENTRY.finditer(text)).start()]):
            self._declare_shared(m)
        self.code: list[Instruction] = []
        self._branches: list[tuple[Instruction, tuple[int, ...], str]] = []
        self._labels: dict[tuple[int, str], int] = {}
        self._names: list[dict[str, str]] = []
        self._parse(text, body)
        for instruction, scopes, label in self._branches:
            targets = [self._labels[scope, label] for scope in reversed(scopes) if (scope, label) in self._labels]
            if not targets:
                raise EmulatorError(f"line {instruction.line}: no label {label!r}")
            instruction.target = targets[0]
        self.compiled: Any = None  # an operands.Builder, made at the first launch
        self.targets = {i.target for i, _, _ in self._branches}

    def _parse(self, text: str, begin: int) -> None:
        line = text.count("\n", 0, begin) + 1
        scopes: list[int] = []
        fresh, vector, statement, at = 0, 0, "", line
        for match in TOKEN.finditer(text, begin):
            label, mark, _ = match.groups()
            blank = not statement.strip()
            if label and blank:
                self._labels[scopes[-1], label] = len(self.code)
            elif mark == "\n":
                line += 1
                if statement.lstrip().startswith(".loc"):
                    statement = ""
                else:
                    statement += " "
            elif mark == "{" and blank:
                scopes.append(fresh)
                self._names.append({})
                fresh += 1
            elif mark == "}" and not vector:
                scopes.pop()
                self._names.pop()
                if not scopes:
                    return
            elif mark == ";" and not vector:
                if not blank:
                    self._statement(" ".join(statement.split()), at, tuple(scopes))
                statement = ""
            else:
                vector += (mark == "{") - (mark == "}")
                if blank:
                    at = line
                statement += match[0]
        raise EmulatorError("PTX ends inside a kernel")

    def _statement(self, statement: str, line: int, scopes: tuple[int, ...]) -> None:
        if statement.startswith(".reg"):
            self._declare_registers(statement, line, scopes[-1])
        elif statement.startswith(".shared"):
            match = SHARED.match(statement)
            if not match:
                raise EmulatorError(f"line {line}: {statement}")
            self._declare_shared(match)
        elif statement.startswith(".pragma"):
            return
        elif statement.startswith("."):
            raise EmulatorError(f"line {line}: directive not modelled: {statement}")
        else:
            self._instruction(statement, line, scopes)

    def _declare_registers(self, statement: str, line: int, scope: int) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        kind = re.sub(r"^[usf](?=\d)", "b", match[1]) if match else ""
        if kind not in WIDTHS:
            raise EmulatorError(f"line {line}: register type not modelled: {statement}")
        for declared in match[2].split(","):
            name, _, count = declared.strip().rstrip(">").partition("<")
            for one in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                unique = f"{one}@{scope}" if scope else one
                self._names[-1][one] = unique
                self.registers[unique] = (len(self.registers), WIDTHS[kind])

    def _declare_shared(self, match: re.Match[str]) -> None:
        elements = 1 if match[4] is None else int(match[4] or 0)
        self.shared[match[3]] = (int(match[1] or 1), elements * int(match[2]) // 8)

    def _instruction(self, statement: str, line: int, scopes: tuple[int, ...]) -> None:
        predicate, negated, rest = None, False, statement
        if statement[0] == "@":
            guard, rest = statement.split(None, 1)
            negated = guard[1] == "!"
            name = self._resolve(guard.lstrip("@!"))
            if name not in self.registers:
                raise EmulatorError(f"line {line}: unknown predicate: {statement}")
            predicate = self.registers[name][0]
        mnemonic, _, operands = rest.partition(" ")
        opcode, *modifiers = mnemonic.split(".")
        resolved = re.sub(r"[%A-Za-z_$][\w$.]*", lambda m: self._resolve(m[0]), operands)
        instruction = Instruction(
            len(self.code), line, statement, predicate, negated, opcode, tuple(modifiers), split_operands(resolved)
        )
        if opcode == "bra":
            self._branches.append((instruction, scopes, operands.strip()))
        self.code.append(instruction)

    def _resolve(self, name: str) -> str:
        for names in reversed(self._names):
            if name in names:
                return names[name]
        return name


def split_operands(text: str) -> list[str]:
    """Operands at the commas outside brackets and braces."""
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def vector(operand: str) -> list[str]:
    """`{a, b}` or `a` as a list."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _directive(header: str, name: str) -> list[str]:
    match = re.search(re.escape(name) + r"\s+([\d,\s]+)", header)
    return match[1].split(",") if match else []
