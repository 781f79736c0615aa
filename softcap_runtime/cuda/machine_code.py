"""What ptxas did that it must not: weights overwritten while a matrix product still reads them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\S* R\d+, (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_WRITES = re.compile(r"(?:@!?U?P\w+ )?(\S+) (?:U?P\w+, )*R(\d+)\b")
# What has a register first, after predicates at most, and writes none.
_READS_ONLY = re.compile("ST|RED|BRA|BRX|BAR|SYNCS|UTMA|R2UR|EXIT|RET|[IFH]SETP")


def overwritten_operands(listing: str) -> list[str]:
    """The instructions of an sm_90 ``listing`` that write a register from which a product under way reads its weights.

    ptxas 12.8 and 12.9 may compile such code (Triton, pull request 11781). An asynchronous product (HGMMA) reads its
    first operand until the wait for its group. One pass in the order of the listing: what two paths make of each other
    is not seen.
    """
    groups: list[set[int]] = []
    current: set[int] = set()
    found = []
    for text in _INSTRUCTION.findall(listing):
        if product := _PRODUCT.search(text):
            if product[1]:
                current |= set(range(int(product[1]), int(product[1]) + 4))
            if "gsb0" in text:
                groups.append(current)
                current = set()
        elif wait := _WAIT.search(text):
            left = int(wait[1], 16)
            groups = groups[-left:] if left else []
        elif text.startswith(("BRA ", "EXIT", "RET")):
            groups, current = [], set()
        elif (write := _WRITES.match(text)) and not _READS_ONLY.match(write[1]):
            first = int(write[2])
            width = 4 if ".128" in write[1] else 2 if ".64" in write[1] or ".WIDE" in write[1] else 1
            if set(range(first, first + width)) & current.union(*groups):
                found.append(text)
    return found


def disassemble(code: bytes, tool: Path) -> str:
    """The listing of a kernel's machine code, by ``nvdisasm``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        done = subprocess.run([tool, "-c", path], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout
