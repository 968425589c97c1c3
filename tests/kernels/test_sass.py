"""The reader of machine code: instructions, loops, spills and serialised wgmma, in text as nvdisasm prints it."""

from __future__ import annotations

from gptkernels import _sass


def _text(*lines: str) -> str:
    """nvdisasm's output for `lines`: gives instructions addresses 16 bytes apart; labels end with a colon."""
    printed, address = ["\t.target\tsm_90a", "_kernel:", ".text._kernel:"], 0
    for line in lines:
        printed.append(line if line.endswith(":") else f"        /*{address:04x}*/                   {line} ;")
        address += 0 if line.endswith(":") else 16
    return "\n".join([*printed, "\t.section\t.nv.info"])


def test_instructions_and_their_kinds():
    code = _sass.parse(
        _text("MUFU.EX2 R1, R2", "MUFU.RCP R1, R2", "@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "STL [R1+0x4], R9")
    )
    assert [i.address for i in code.instructions] == [0, 16, 32, 48]
    assert code.counts == {"MUFU.EX2": 1, "MUFU.RCP": 1, "LDG": 1, "STL": 1}
    load = code.instructions[2]
    assert (load.predicate, load.opcode, load.operands) == ("@!P0", "LDG.E.128", "R4, desc[UR4][R2.64]")
    assert code.spills == 1
    assert code.loops == ()


def test_nested_loops_and_their_instructions():
    code = _sass.parse(
        _text(
            "S2R R0, SR_TID.X",
            ".L_x_0:",  # 0x10
            "LDG.E R1, desc[UR4][R2.64]",
            "@P2 BRA `(.L_x_4)",
            ".L_x_1:",  # 0x30
            "FFMA R1, R1, R1, R1",
            "@P0 BRA `(.L_x_1)",
            ".L_x_2:",  # 0x50
            "BRA.DIV ~URZ, `(.L_x_5)",
            "@!P1 BRA `(.L_x_0)",
            "EXIT",
            ".L_x_4:",  # 0x80, entered from the outer loop, goes back into it
            "FADD R1, R1, R1",
            "BRA `(.L_x_2)",
            ".L_x_5:",  # 0xa0: a branch onwards, in no loop
            "BRA `(.L_x_6)",
            ".L_x_6:",
            "EXIT",
            ".L_x_3:",  # behind the end of every program
            "BRA `(.L_x_3)",
        )
    )
    outer, inner = code.loops
    assert (outer.start, outer.end, outer.depth) == (0x10, 0x60, 0)
    assert (inner.start, inner.end, inner.depth) == (0x30, 0x40, 1)
    assert inner.counts == {"FFMA": 1, "BRA": 1}
    assert outer.counts == {"LDG": 1, "FFMA": 1, "FADD": 1, "BRA": 5}


def test_a_branch_back_outside_of_a_loop():
    code = _sass.parse(_text("@P0 BRA `(.L_x_1)", ".L_x_0:", "FADD R1, R1, R1", "EXIT", ".L_x_1:", "BRA `(.L_x_0)"))
    assert code.loops == ()


def test_wgmma_that_waits_for_the_one_before_it():
    first, more = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    other = "HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    serialised = (f"{first}, gsb0", wait, f"{more}, gsb0", wait, f"{more}, gsb0", wait, other, wait)
    chains = (first, more, f"{more}, gsb0", wait, f"{more}", f"{more}, gsb0", wait, other, wait)
    alone = (f"{first}, gsb0", wait, other, wait, f"{first}, gsb0", wait)  # products of 16 columns
    assert _sass.parse(_text(*serialised)).wgmma_serialised
    assert not _sass.parse(_text(*chains)).wgmma_serialised
    assert not _sass.parse(_text(*alone)).wgmma_serialised
    assert not _sass.parse(_text("HMMA.16816.F32 R4, R8, R12, R4")).wgmma_serialised
