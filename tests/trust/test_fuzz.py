"""Any reader given any bytes gives a value or an error of zgraph's, soon and in little memory."""

import random
import resource
import time
import warnings

import pytest

from tests.deep import DEEP
from tests.trust.readers import readers
from zgraph.errors import ZgraphError

NUM_INPUTS = 20_000 if DEEP else 1_500
"""For all readers together."""

MAX_SECONDS = 4.0
"""Of one core for one input; half a second is usual for the worst. What is measured is this process's alone."""

MAX_KIB = 128 << 10
"""By which one input may raise the most memory that the process ever had."""

# fmt: off
WORDS = [
    b"", b"0", b"-1", b"1", b"2", b"9" * 400, b"9" * 5000, b"1e999", b"nan", b"inf", b"-0.0", b"null", b"true", b"{}",
    b"[]", b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"(" * 300, b'"', b"\\", b"\\u0000", b"\\ud800", b"\0",
    b"\x1b[2J", b"\xff", b"\xc2\xb2", b"\xd9\xa3", b"\xe2\x80\xae", b" ", b"\n", b"\r", b"\t", b"=", b":", b",",
    b"->", b"; ", b"%", b"@", b"<S0>", b"<V>", b"<P>", b"<P(sum)>", b"s0", b"2*s0", b"s0**8", b"1/0", b"floor(s0/2)",
    b"Mod(s0, s0)", b"future ", b"aten.neg.default", b"aten.__class__", b"py.call", b"..", b"/", b"../x", b"a" * 300,
    b"a" * 20_000, b"h100", b"x8-", b".toml", b"f32", b"none", b"host", b"at=[0]", b"<S1>", b"-5", b"1e-300",
]
# fmt: on


def changed(valid: bytes, other: bytes, dice: random.Random) -> bytes:
    """A valid input with one to four changes of any kind."""
    found = valid
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(found) + 1)
        end = min(len(found), at + dice.choice((1, 1, 2, 5, 20, 200)))
        match dice.randrange(8):
            case 0:
                found = found[:at] + dice.choice(WORDS) + found[at:]
            case 1:
                found = found[:at] + dice.choice(WORDS) + found[end:]
            case 2:
                found = found[:at] + found[end:]
            case 3:
                found = found[:end] + found[at:]
            case 4:
                found = found[:at] + dice.randbytes(1) + found[at + 1 :]
            case 5:
                start = dice.randrange(len(other) + 1)
                found = found[:at] + other[start : start + dice.randint(1, 60)] + found[end:]
            case 6:
                lines = found.splitlines(keepends=True)
                dice.shuffle(lines) if dice.random() < 0.2 else lines.insert(0, lines.pop()) if lines else None
                found = b"".join(lines)
            case _:
                found = token(found, dice)
    return found


def token(text: bytes, dice: random.Random) -> bytes:
    """The same with one word or number in the place of another of it."""
    words = text.replace(b"(", b" ").replace(b",", b" ").replace(b":", b" ").replace(b")", b" ").split()
    return text.replace(dice.choice(words), dice.choice((*words, *WORDS)), 1) if words else text


@pytest.mark.parametrize("name", readers())
def test_every_input_ends_in_a_value_or_an_error_of_zgraph(name):
    reader, dice = readers()[name], random.Random(name)
    for valid in reader.valid[:3]:
        if valid != b"none.toml":
            reader.read(valid)
    faults: list[str] = []
    refused = 0
    num_inputs = NUM_INPUTS // len(readers())
    for number in range(num_inputs):
        given = changed(dice.choice(reader.valid), dice.choice(reader.valid), dice)
        memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(given)
        except ZgraphError as error:
            refused += 1
            if len(str(error)) > 2 * len(given) + 5_000:
                faults.append(f"{number}: says {len(str(error)):,} characters of {given[:200]!r}")
        except BaseException as error:
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:200]} of {given[:300]!r}")
        seconds = time.process_time() - began
        if seconds > MAX_SECONDS:
            faults.append(f"{number}: took {seconds:.1f} s, of {given[:300]!r}")
        if (kib := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) > MAX_KIB:
            faults.append(f"{number}: took {kib:,} KiB, of {given[:300]!r}")
    assert not faults, f"{len(faults)} of {num_inputs}\n" + "\n".join(faults[:20])
    assert refused > num_inputs // 10
