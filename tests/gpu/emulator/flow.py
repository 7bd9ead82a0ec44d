"""Which register reads are not preceded by a write on every path: only those are watched at run time."""

from collections.abc import Sequence


def successors(code: Sequence, position: int) -> list[int]:
    instruction = code[position]
    after = [position + 1] if position + 1 < len(code) else []
    if instruction.opcode == "bra":
        return [instruction.target] if instruction.predicate is None else [instruction.target, *after]
    if instruction.opcode in ("ret", "exit") and instruction.predicate is None:
        return []
    return after


def unproven_reads(code: Sequence, reads: list[set[int]], writes: list[set[int]]) -> set[int]:
    """Registers that some instruction reads without a write on every path to it.

    A predicated write counts: the threads it skips keep the poison they started with, which Triton relies on for masked
    loads without `other`. Registers are numbered bits of Python integers; blocks are iterated to the fixed point.
    """
    starts = {0} | {i.target for i in code if i.opcode == "bra"}
    starts |= {i.position + 1 for i in code if i.opcode in ("bra", "ret", "exit")}
    leaders = sorted(s for s in starts if s < len(code))
    ends = [*leaders[1:], len(code)]
    everything = -1
    gained = {}
    for start, end in zip(leaders, ends, strict=True):
        bits = 0
        for position in range(start, end):
            for register in writes[position]:
                bits |= 1 << register
        gained[start] = bits
    before = dict.fromkeys(leaders, everything)
    before[0] = 0
    todo = [0]
    end_of = dict(zip(leaders, ends, strict=True))
    while todo:
        start = todo.pop()
        after = before[start] | gained[start]
        for target in successors(code, end_of[start] - 1):
            if before[target] & after != before[target]:
                before[target] &= after
                todo.append(target)
    unproven: set[int] = set()
    for start in leaders:
        known = before[start]
        for position in range(start, end_of[start]):
            unproven |= {register for register in reads[position] if not known >> register & 1}
            for register in writes[position]:
                known |= 1 << register
    return unproven
