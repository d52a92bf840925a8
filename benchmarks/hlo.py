"""Counts kernels, bytes and loops in the text of a program that XLA has compiled and scheduled.

    python benchmarks/hlo.py FILE

prints the loops of a stored program and its heaviest instructions. It needs nothing but Python.

What is counted:

- **Launches**: every instruction of an executed computation but those that only name or regroup
  values (``FREE``); a fusion is one, a started and finished asynchronous operation is one.
- **Bytes**: operands and results of each launch. Slices and gathers read what they take, in-place
  writes what they replace, also inside a fusion. What stays in a cache counts in full, what a TPU
  keeps on the chip by its own decision does not.
- **Loops**: what lies in one counts times its trip count. A loop without a known count is taken
  once and listed: a GPU's host reads its condition back at each trip. So does it for a conditional,
  of which the branch of most launches is taken.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "tuple",
    }
)
"""Operations that launch nothing; neither does any ``*-done`` and ``*-update``."""

COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "recv",
        "reduce-scatter",
        "send",
    }
)
"""Operations that exchange data between devices."""

_ITEM_BYTES = {
    "pred": 1.0, "bf16": 2.0, "token": 0.0, "opaque": 0.0, "c64": 8.0, "c128": 16.0,
}  # fmt: skip
_HOST_CALL = re.compile(r"callback|host", re.IGNORECASE)
_MOST_UNROLLED = 16
"""Steps of a loop that XLA or ``scan(unroll=...)`` may have written out in one trip."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of one array.

    Attributes:
        dtype: name of its elements' type.
        size: number of elements.
        on_chip: whether a TPU keeps it on the chip (memory space 1).
    """

    dtype: str
    size: int
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        """Bytes that reading or writing it takes from memory."""
        return 0.0 if self.on_chip else self.size * item_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in the module.
        opcode: such as ``fusion``.
        arrays: arrays of its result, one unless it is a tuple.
        operands: names.
        attributes: text behind the operands.
        root: whether it is the computation's result.
        number: value of an integer constant, else None.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool
    number: int | None = None

    @property
    def size(self) -> int:
        """Elements of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    def share(self, size: float) -> float:
        """Bytes of a number of its elements."""
        return self.bytes * size / max(self.size, 1)

    def called(self, *names: str) -> list[str]:
        """Computations named by attributes such as ``body``."""
        found = []
        for name in names:
            for one, several in re.findall(
                rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                found += [one] if one else re.findall(r"[\w.\-]+", several)
        return found

    @property
    def op_name(self) -> str:
        """What it was traced from, such as ``jit(f)/while/body/add``; empty where unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Loop:
    """A loop, or the whole program.

    Attributes:
        name: of its instruction.
        where: function and line it comes from, innermost first; empty where unknown.
        trips: number of trips, None if it depends on data.
        launches: of one trip, without inner loops.
        bytes: likewise.
        products: matrix products and convolutions of one trip, likewise.
        inner: loops in it, in order of execution.
        items: its launches: times a trip, and the instruction with its bytes.
    """

    name: str
    where: str = ""
    trips: int | None = 1
    launches: float = 0
    bytes: float = 0
    products: int = 0
    inner: list["Loop"] = dataclasses.field(default_factory=list)
    items: list[tuple[Instruction, float]] = dataclasses.field(default_factory=list)

    @property
    def times(self) -> int:
        """Trips as counted: 1 where they depend on data."""
        return 1 if self.trips is None else self.trips

    def total(self, field: str = "launches") -> float:
        """Launches, bytes or products of one trip, inner loops included."""
        return getattr(self, field) + sum(loop.times * loop.total(field) for loop in self.inner)

    def walk(self, times: int = 1) -> Iterator[tuple["Loop", int]]:
        """All loops in it in order, each with its trips for one trip of this one."""
        for loop in self.inner:
            yield loop, times * loop.times
            yield from loop.walk(times * loop.times)


@dataclasses.dataclass(frozen=True)
class ReadBack:
    """A decision that the host must read from the device.

    Attributes:
        kind: ``loop``, ``conditional`` or ``host call``.
        name: of the instruction.
        where: function and line; empty where unknown.
        loops: names of the loops around it, outermost first.
    """

    kind: str
    name: str
    where: str
    loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A counted program.

    Attributes:
        main: all of it as a loop of one trip.
        read_backs: loops whose end depends on data, conditionals, calls of the host.
        collectives: number of instructions that exchange data between devices.
    """

    main: Loop
    read_backs: tuple[ReadBack, ...]
    collectives: int


@dataclasses.dataclass(frozen=True)
class Regions:
    """Launches and bytes of the parts of one iteration of training.

    Attributes:
        iteration: launches, all in all.
        iteration_bytes: likewise.
        env_step: of a step of acting.
        env_step_bytes: likewise.
        gae_step: of a step of the advantages' scan; None where no loop makes them.
        gae_steps: number of such steps, of all passes over the rollout.
        update: of an update; None where an iteration has a single one, which no loop marks.
        update_bytes: likewise.
        rest: of the iteration without these.
        inside: names of the loops that the iteration consists of, itself included.
    """

    iteration: float
    iteration_bytes: float
    env_step: float
    env_step_bytes: float
    gae_step: float | None
    gae_steps: int
    update: float | None
    update_bytes: float | None
    rest: float
    inside: frozenset[str]


# Reading


def item_bytes(dtype: str) -> float:
    """Bytes of an element; half of one for types of 4 bits."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    # f32, u8, f8e4m3fn, s4: the first number is its bits.
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0.0


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations of a module's text by name, and the name of the one that is run.

    Raises:
        ValueError: it has no ENTRY, or a line is not understood.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? (?:-> .*)?\{$", line)
        if header and not line.startswith(" "):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in the text")
    return computations, entry


def _instruction(line: str) -> Instruction:
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        raise ValueError(f"not an instruction: {line.strip()[:100]}")
    rest = line[head.end() :]
    # A tuple's type is in parentheses; layouts such as {1,0:T(8,128)} have some of their own.
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    arrays = tuple(
        Array(dtype, math.prod(int(size) for size in re.findall(r"\d+", shape)), "S(1)" in layout)
        for dtype, shape, layout in re.findall(r"(\w+)\[([^\]]*)\](\{[^}]*\})?", rest[:end])
    )
    operation = re.match(r" *([\w\-]+)", rest[end:])
    start = rest.index("(", end)
    assert operation is not None
    stop = _closing(rest, start)
    inside, number, operands = rest[start + 1 : stop - 1], None, ()
    if operation[1] != "constant":
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    elif re.fullmatch(r"-?\d+", inside):
        number = int(inside)
    return Instruction(head[2], operation[1], arrays, operands, rest[stop:], bool(head[1]), number)


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"unbalanced: {text[start : start + 100]}")


def sources(text: str) -> Callable[[Instruction], str]:
    """A function that tells where in the Python source an instruction comes from."""

    def table(title: str, pattern: str) -> dict[int, tuple[str, ...]]:
        part = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        rows = re.findall(rf"^(\d+) {pattern}", part[1] if part else "", re.MULTILINE)
        return {int(number): tuple(values) for number, *values in rows}

    files = table("FileNames", r'"(.*)"')
    functions = table("FunctionNames", r'"(.*)"')
    places = table("FileLocations", r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    frames = table("StackFrames", r"\{file_location_id=(\d+)")

    def where(instruction: Instruction) -> str:
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame = frames.get(int(found[1])) if found else None
        if frame is None:
            return ""
        file, function, line = places[int(frame[0])]
        name = functions[int(function)][0].replace("<locals>.", "")
        return f"{Path(files[int(file)][0]).name}:{line} {name}"

    return where


# Counting


def count(text: str) -> Program:
    """Counts a scheduled program.

    Args:
        text: ``compiled.as_text()``.

    Raises:
        ValueError: the text is no such program.
    """
    computations, entry = parse(text)
    where = sources(text)
    found: list[ReadBack] = []

    def visit(name: str, loop: Loop, around: tuple[str, ...]) -> None:
        """Adds what a computation launches to ``loop``."""
        computation = computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = trips_of(instruction, computation, computations)
                inner = Loop(instruction.name, where(instruction), trips)
                loop.inner.append(inner)
                # A GPU counts the trips of a loop of known length without its condition.
                parts = ("body",) if trips is not None else ("body", "condition")
                for called in instruction.called(*parts):
                    visit(called, inner, (*around, instruction.name))
                if trips is None:
                    found.append(ReadBack("loop", instruction.name, inner.where, around))
            elif opcode == "conditional":
                found.append(ReadBack("conditional", instruction.name, where(instruction), around))
                _add_largest(instruction, loop, around)
            elif opcode == "call" or opcode == "async-start":
                for called in instruction.called("to_apply", "calls"):
                    visit(called, loop, around)
            elif launches(instruction):
                moved = bytes_moved(instruction, computation, computations)
                loop.launches += 1
                loop.bytes += moved
                loop.products += _is_product(instruction, computations)
                loop.items.append((instruction, moved))
                if _calls_host(instruction):
                    place = where(instruction)
                    found.append(ReadBack("host call", instruction.name, place, around))

    def _add_largest(instruction: Instruction, loop: Loop, around: tuple[str, ...]) -> None:
        branches = []
        for called in instruction.called(
            "branch_computations", "true_computation", "false_computation"
        ):
            branch = Loop(called)
            visit(called, branch, around)
            branches.append(branch)
        largest = max(branches, key=Loop.total)
        loop.launches += largest.launches
        loop.bytes += largest.bytes
        loop.products += largest.products
        loop.inner += largest.inner
        loop.items += largest.items

    main = Loop(entry)
    visit(entry, main, ())
    collectives = sum(
        instruction.opcode.removesuffix("-start") in COLLECTIVES
        for computation in computations.values()
        for instruction in computation.values()
    )
    return Program(main, tuple(found), collectives)


def trips_of(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """Trips of a loop, noted by XLA or told by a counter from a number to a number; else None."""
    noted = re.search(r'known_trip_count":\{"n":"?(\d+)', loop.attributes.replace(" ", ""))
    if noted:
        return int(noted[1])
    condition, body = (computations[loop.called(part)[0]] for part in ("condition", "body"))
    carried = _origin(computation, loop.operands[0])
    end, carried_on = _root(condition), _root(body)
    if end.opcode != "compare" or "direction=LT" not in end.attributes:
        return None
    counter, limit = (_origin(condition, name) for name in end.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if place is None or {carried.opcode, carried_on.opcode} != {"tuple"}:
        return None
    start = _origin(computation, carried.operands[int(place[1])])
    step = _origin(body, carried_on.operands[int(place[1])])
    if step.opcode != "add":
        return None
    before, by = (_origin(body, name) for name in step.operands)
    counts = before.opcode == "get-tuple-element" and place[0] in before.attributes
    numbers = (start.number, limit.number, by.number)
    if not counts or None in numbers or not by.number:
        return None
    return max(0, math.ceil((limit.number - start.number) / by.number))  # type: ignore[operator]


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _origin(computation: Computation, name: str) -> Instruction:
    """The instruction that a name stands for, behind copies of it."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def launches(instruction: Instruction) -> bool:
    """Whether an instruction other than a loop, a conditional or a call launches something."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return False
    return _target(instruction) not in ("AllocateBuffer", "ConcatBitcast")


def _target(instruction: Instruction) -> str:
    """What a custom call calls; empty where it is none."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _calls_host(instruction: Instruction) -> bool:
    return instruction.opcode in ("infeed", "outfeed") or bool(
        _HOST_CALL.search(_target(instruction))
    )


def _is_product(instruction: Instruction, computations: dict[str, Computation]) -> bool:
    if instruction.opcode == "fusion":
        return any(
            _is_product(inner, computations)
            for called in instruction.called("calls")
            for inner in computations[called].values()
        )
    # Kernels written by hand, Triton's and Mosaic's, hold products here.
    return instruction.opcode in ("dot", "convolution") or bool(
        re.search(r"gemm|matmul|conv|dot|triton|tpu_custom_call", _target(instruction))
    )


def bytes_moved(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
    """Bytes that a launch reads and writes.

    Args:
        instruction: the launch.
        computation: where its operands are.
        computations: all of the module.
    """
    opcode, result = instruction.opcode, instruction.bytes
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "fusion":
        return _fusion_bytes(computations[instruction.called("calls")[0]])
    if opcode in ("slice", "dynamic-slice"):
        return result + operands[0].share(instruction.size)
    if opcode == "gather":
        return result + operands[0].share(instruction.size) + operands[1].bytes
    if opcode == "dynamic-update-slice":
        return operands[1].bytes + operands[0].share(operands[1].size)
    if opcode == "scatter":
        count = (len(operands) - 1) // 2
        updates = operands[count + 1 :]
        pairs = zip(operands[:count], updates, strict=True)
        # A place that is updated is read and written.
        touched = sum(2 * target.share(update.size) for target, update in pairs)
        return operands[count].bytes + sum(update.bytes for update in updates) + touched
    if opcode == "slice-start":
        taken = instruction.arrays[1]
        return taken.bytes + operands[0].share(taken.size)
    if opcode.endswith("-start"):
        # The result repeats the operands and holds a handle, or it is the future result alone.
        several = len(instruction.arrays) > 1
        return result if several else result + sum(operand.bytes for operand in operands)
    if opcode == "custom-call" and len(instruction.arrays) > 1:
        # cuBLAS and others return their scratch memory as bytes.
        result = sum(array.bytes for array in instruction.arrays if array.dtype not in ("s8", "u8"))
    return result + sum(operand.bytes for operand in operands)


def _fusion_bytes(fused: Computation) -> float:
    """Bytes of a fusion: what its result needs of each operand, traced back through it."""
    root = _root(fused)
    needed: dict[str, float] = dict.fromkeys(fused, 0.0)
    written = 0.0

    def need(name: str, size: float) -> None:
        needed[name] = min(needed[name] + size, fused[name].size)

    def write(result: Instruction) -> float:
        """Bytes written for a result; in-place writes leave the rest of a buffer alone."""
        target = result
        while target.opcode == "bitcast":
            target = fused[target.operands[0]]
        if target.opcode in ("dynamic-update-slice", "scatter"):
            buffer = fused[target.operands[0]]
            while buffer.opcode == "bitcast":
                buffer = fused[buffer.operands[0]]
            if buffer.opcode == "parameter" or buffer.opcode == target.opcode:
                updates = 1 if target.opcode == "dynamic-update-slice" else 2
                update = fused[target.operands[updates]]
                for name in target.operands[1:]:
                    need(name, fused[name].size)
                if target.opcode == "scatter":
                    need(buffer.name, update.size)
                before = write(buffer) if buffer.opcode == target.opcode else 0.0
                return before + result.share(update.size)
        need(result.name, result.size)
        return result.bytes

    for name in root.operands if root.opcode == "tuple" else (root.name,):
        written += write(fused[name])
    for instruction in reversed(fused.values()):
        size = needed[instruction.name]
        if not size:
            continue
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("slice", "dynamic-slice", "gather"):
            need(operands[0], size)
            for name in operands[1:]:
                need(name, fused[name].size * size / instruction.size)
        elif opcode == "dynamic-update-slice":
            update = fused[operands[1]].size
            need(operands[1], min(size, update))
            need(operands[0], max(size - update, 0))
            for name in operands[2:]:
                need(name, 1)
        elif opcode in ("broadcast", "pad"):
            for name in operands:
                need(name, size)
        else:
            for name in operands:
                need(name, fused[name].size * size / instruction.size)
    read = sum(
        instruction.share(needed[name])
        for name, instruction in fused.items()
        if instruction.opcode == "parameter"
    )
    return written + read


# Regions


def regions(main: Loop, env_steps: int, updates: int, gae_steps: int | None = None) -> Regions:
    """Finds an iteration of training and its parts by their numbers of repetitions.

    An iteration is the innermost loop that holds both the loop of acting, which comes first in it,
    and that of the updates. The numbers must differ; a trip may have several steps written out.

    Args:
        main: the program.
        env_steps: steps of acting an iteration, or tokens sampled.
        updates: updates an iteration; a single one leaves no loop to find.
        gae_steps: length of the advantages' scan, None where there is none.

    Raises:
        ValueError: no loop has these numbers.
    """
    found = None
    for candidate in [main, *(loop for loop, _ in main.walk())]:
        # Loops further in come later.
        found = _iteration(candidate, env_steps, updates) or found
    if found is None:
        raise ValueError(f"no loop of {env_steps} steps beside one of {updates} updates")
    iteration, (acting, acting_trips), learning, behind = found

    def share(field: str) -> float | None:
        return learning and learning[0].total(field) * learning[1] / updates

    acted, launched = acting.total() * acting_trips, iteration.total()
    update = share("launches")
    scans = [
        (loop, times)
        for loop, times in behind
        if gae_steps and _is_scan(loop, gae_steps) and loop is not (learning and learning[0])
    ]
    steps = sum((gae_steps or 0) * times // loop.times for loop, times in scans)
    in_update = {id(loop) for loop, _ in learning[0].walk()} if learning else set()
    rest = launched - acted - updates * (update or 0)
    rest -= sum(loop.total() * times for loop, times in scans if id(loop) not in in_update)
    return Regions(
        iteration=launched,
        iteration_bytes=iteration.total("bytes"),
        env_step=acted / env_steps,
        env_step_bytes=acting.total("bytes") * acting_trips / env_steps,
        gae_step=sum(loop.total() * times for loop, times in scans) / steps if steps else None,
        gae_steps=steps,
        update=update,
        update_bytes=share("bytes"),
        rest=rest,
        inside=frozenset({iteration.name, *(loop.name for loop, _ in iteration.walk())}),
    )


_Repeated = tuple[Loop, int]


def _iteration(
    candidate: Loop, env_steps: int, updates: int
) -> tuple[Loop, _Repeated, _Repeated | None, list[_Repeated]] | None:
    """A loop as an iteration: itself, acting, updates, and all loops behind acting; or None."""
    inner = [(loop, times) for loop, times in candidate.walk() if loop.trips]
    acting = next((pair for pair in inner if _written_out(env_steps, pair[1])), None)
    if acting is None or (updates == 1 and acting[0] not in candidate.inner):
        return None
    own = {id(acting[0]), *(id(loop) for loop, _ in acting[0].walk())}
    behind = [pair for pair in inner[inner.index(acting) :] if id(pair[0]) not in own]
    fitting = [
        (loop, times)
        for loop, times in behind
        if loop.total("products") and _written_out(updates, times)
    ]
    if updates > 1 and not fitting:
        return None
    # A loop of one update a trip rather than one of several.
    learning = max(fitting, key=lambda pair: (pair[1], pair[0].total("bytes"))) if fitting else None
    return candidate, acting, learning if updates > 1 else None, behind


def _is_scan(loop: Loop, steps: int) -> bool:
    """Whether a loop may be a scan of as many steps of the advantages."""
    simple = not loop.inner and not loop.total("products")
    return simple and loop.times > 2 and _written_out(steps, loop.times)


def _written_out(steps: int, trips: int) -> bool:
    """Whether ``steps`` may be ``trips`` with some steps written out in each."""
    unrolled = steps // trips if trips else 0
    return steps == trips * unrolled and 1 <= unrolled <= _MOST_UNROLLED


def outline(loop: Loop, depth: int = 0) -> Iterator[str]:
    """A line for each loop: trips, launches and bytes of a trip, and where it comes from."""
    trips = "?" if loop.trips is None else str(loop.trips)
    total, moved = loop.total(), loop.total("bytes")
    counted = f"{trips} x {total:,.0f} launches, {moved / 1e6:,.1f} MB"
    yield f"{'  ' * depth}{counted}  {loop.where or loop.name}"
    for inner in loop.inner:
        yield from outline(inner, depth + 1)


def heaviest(main: Loop, most: int) -> list[tuple[float, float, Instruction]]:
    """Instructions that move most bytes: bytes in all, times, instruction."""
    found: list[tuple[float, float, Instruction]] = []
    for loop, times in [(main, 1), *main.walk()]:
        found += [(times * moved, times, instruction) for instruction, moved in loop.items]
    return sorted(found, key=lambda item: -item[0])[:most]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the loops of a stored program and what moves most bytes in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="text of a compiled program")
    parser.add_argument("--heaviest", type=int, default=40, help="instructions to list (40)")
    options = parser.parse_args(arguments)
    text = options.file.read_text()
    program, where = count(text), sources(text)
    print("\n".join(outline(program.main)))
    for moved, times, instruction in heaviest(program.main, options.heaviest):
        name = f"{instruction.name} {instruction.op_name.split('/')[-1]}"
        print(f"{moved / 1e6:12,.1f} MB  {times:6,} x  {name:60}  {where(instruction)}")
    print(json.dumps([dataclasses.asdict(read_back) for read_back in program.read_backs], indent=1))


if __name__ == "__main__":
    main()
