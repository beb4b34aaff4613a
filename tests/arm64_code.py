"""Follows the machine code that a compiler made for arm64, to see that no path goes without a fence that is needed.

A rule names a function and three kinds of instructions: what makes a fence necessary (a bit was set, data was read),
what fences, and what must not be reached before that. All paths through the function are followed, also into the
functions of the same object file that it calls.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMPILER = "aarch64-linux-gnu-gcc"
OBJDUMP = "aarch64-linux-gnu-objdump"

UNCONDITIONAL = {"b", "ret", "br", "udf", "brk"}
FENCED, OPEN = 1, 2  # a set of these: on some path there


@dataclass
class Instruction:
    address: int
    name: str
    operands: str
    symbol: str = ""  # of a call or a tail call

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {self.operands} {self.symbol}".rstrip()

    @property
    def jump(self) -> int | None:
        """Where a branch inside the section goes."""
        if not re.fullmatch(r"b|b\.\w+|cbn?z|tbn?z", self.name) or self.symbol:
            return None
        found = re.search(r"([0-9a-f]+) <", self.operands)
        assert found, str(self)
        return int(found[1], 16)


Match = Callable[[Instruction], bool]


def calls(*symbols: str) -> Match:
    return lambda instruction: instruction.symbol in symbols


def any_call(instruction: Instruction) -> bool:
    return bool(instruction.symbol)


def acquire_load(instruction: Instruction) -> bool:
    return instruction.name.startswith(("ldar", "ldapr"))


def either(*matches: Match) -> Match:
    return lambda instruction: any(match(instruction) for match in matches)


def full_fence(instruction: Instruction) -> bool:
    return instruction.name == "dmb" and instruction.operands == "ish"


def atomic_add(size: int) -> Match:
    """A sequentially consistent read-modify-write of 4 or 8 bytes, in any of the forms that compilers choose."""
    register = "w" if size == 4 else "x"

    def match(instruction: Instruction) -> bool:
        if instruction.symbol:
            return re.fullmatch(rf"__aarch64_ld\w+{size}_acq_rel", instruction.symbol) is not None
        if instruction.name == "stlxr":
            return re.match(rf"w\d+, {register}", instruction.operands) is not None
        return re.fullmatch(r"ld(add|set|clr)al", instruction.name) is not None and instruction.operands[0] == register

    return match


def store_release(instruction: Instruction) -> bool:
    return instruction.name == "stlr"


def strong_load(instruction: Instruction) -> bool:
    """The load-acquire that is ordered after earlier store-releases; ldapr is not."""
    return instruction.name == "ldar"


def weak_load(instruction: Instruction) -> bool:
    """Any other load, but for those of the stack and of constants; stlxr's own ldaxr begins an atomic operation."""
    if not re.match(r"ld(r|p|ur|apr|apur)", instruction.name):
        return False
    return not re.search(r"\[(sp|x29)\b|:lo12:", instruction.operands)


@dataclass
class Rule:
    name: str
    source: str
    function: str
    opens: Match
    needs: Match
    fences: Match = full_fence
    at_entry: int = FENCED


def compile_source(source: Path, include: Path, output: Path, flags: tuple[str, ...] = ()) -> None:
    command = [COMPILER, "-std=gnu11", "-O2", *flags, f"-I{include}", "-c", "-o", str(output), str(source)]
    subprocess.run(command, check=True)


class Code:
    """An object file's functions."""

    def __init__(self, file: Path) -> None:
        command = [OBJDUMP, "-dr", "--no-show-raw-insn", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.functions: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if found := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
                current = self.functions.setdefault(found[1], [])
            elif found := re.match(r"\s+[0-9a-f]+: R_AARCH64_(?:CALL|JUMP)26\s+(\S+)", line):
                current[-1].symbol = found[1]
            elif found := re.match(r"\s*([0-9a-f]+):\t(\S+)\s*(.*?)\s*(?://.*)?$", line):
                current.append(Instruction(int(found[1], 16), found[2], found[3]))
        for name, instructions in self.functions.items():
            own = {instruction.address for instruction in instructions}
            for instruction in instructions:
                if instruction.name in ("b", "bl") and not instruction.symbol:
                    target = re.search(r"([0-9a-f]+) <([^+>]+)", instruction.operands)
                    assert target, str(instruction)
                    if instruction.name == "bl" or int(target[1], 16) not in own:
                        instruction.symbol = target[2]
                assert instruction.name != "br", f"{name}: {instruction}: where does it go?"

    def violations(self, rule: Rule) -> tuple[set[str], int]:
        """What is reached without a fence; and how many places matter to the rule."""
        return Walk(self, rule).result()


class Walk:
    def __init__(self, code: Code, rule: Rule) -> None:
        self.code, self.rule = code, rule
        self.bad: set[str] = set()
        self.places: set[tuple[str, int]] = set()
        self.summaries: dict[tuple[str, int], int] = {}

    def result(self) -> tuple[set[str], int]:
        assert self.rule.function in self.code.functions, self.rule.function
        before = None
        while before != self.summaries:  # until recursive functions have settled
            before = dict(self.summaries)
            done: set[tuple[str, int]] = set()
            self.follow(self.rule.function, self.rule.at_entry, done)
        return self.bad, len(self.places)

    def follow(self, function: str, entry: int, done: set[tuple[str, int]]) -> int:
        """The states in which it may return, when it is called in state `entry`."""
        key = function, entry
        if key in done:
            return self.summaries.get(key, 0)
        done.add(key)
        instructions = self.code.functions[function]
        index = {instruction.address: n for n, instruction in enumerate(instructions)}
        states = [0] * len(instructions)
        states[0] = entry
        work, returned = [0], 0
        while work:
            n = work.pop()
            instruction, state = instructions[n], states[n]
            after = self.step(function, instruction, state, done)
            follows = []
            if instruction.name == "ret" or (instruction.name == "b" and instruction.symbol):
                returned |= after
            elif instruction.jump is not None:
                follows.append(index[instruction.jump])
            if instruction.name not in UNCONDITIONAL and n + 1 < len(instructions):
                follows.append(n + 1)
            for m in follows:
                if states[m] | after != states[m]:
                    states[m] |= after
                    work.append(m)
        self.summaries[key] = returned
        return returned

    def step(self, function: str, instruction: Instruction, state: int, done: set[tuple[str, int]]) -> int:
        rule = self.rule
        if rule.needs(instruction) or (rule.fences(instruction) and state & OPEN):
            self.places.add((function, instruction.address))
        if rule.needs(instruction) and state & OPEN:
            self.bad.add(f"{function}: {instruction}")
        if rule.fences(instruction):
            return FENCED
        if rule.opens(instruction):
            return OPEN
        if instruction.symbol in self.code.functions:
            after = 0
            for entry in (FENCED, OPEN):
                if state & entry:
                    after |= self.follow(instruction.symbol, entry, done)
            return after
        return state


CHANGES = calls("image_write", "image_zero", "image_discard")
LOOKS = either(acquire_load, calls("bitmap_next_set", "bitmap_next_clear"))

# One for each fence, and two for the gate. docs/memory-order.md says why.
RULES = [
    Rule("write", "cbw.c", "cbw_change", lambda i: any_call(i) and not CHANGES(i), CHANGES, at_entry=OPEN),
    Rule("wait", "cbw.c", "cbw_change", atomic_add(4), calls("pthread_mutex_lock")),
    Rule("save", "cbw.c", "cbw_change", calls("bitmap_set"), calls("bitmap_next_set")),
    Rule("claims", "snapshot.c", "snapshot_claims_changed", lambda i: False, acquire_load, at_entry=OPEN),
    Rule("kept", "snapshot.c", "snapshot_source_kept", lambda i: False, any_call, at_entry=OPEN),
    Rule("read", "snapshot.c", "fl_snapshot_pread", calls("image_read", "store_read"), LOOKS),
    Rule("extents", "snapshot.c", "find_extents", calls("image_extents"), LOOKS),
    Rule("release", "snapshot.c", "fl_snapshot_discard", calls("bitmap_set"), calls("bitmap_next_set")),
    Rule("enter", "gate.c", "gate_enter", atomic_add(8), weak_load, strong_load),
    Rule("leave", "gate.c", "gate_leave", atomic_add(8), weak_load, strong_load),
    Rule("close", "gate.c", "gate_close", store_release, acquire_load),
    Rule("shut", "gate.c", "gate_shut_until", store_release, acquire_load),
]
