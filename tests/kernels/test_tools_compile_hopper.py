"""Reading of machine code, and comparison with the table of the Hopper kernels."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from tools import compile_hopper, sass
from tools.compile_hopper import Explanation, Row

# A loop in a loop, as the compiler leaves them: blocks of work from 0x10 to 0xe0, whose last product stands behind the
# loop over tiles, 0x30 to 0xb0. In that, tiles that need no mask jump over 0x60 and 0x70, and whoever finds a barrier
# closed waits at 0x100 and comes back.
LISTING = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
        /*0010*/                   LDL R3, [R1] ;                               /* 0x0000000001037983 */
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], !UPT ;  /* 0x01e00000041879f0 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3] ;    /* 0x000000030000755a */
        /*0040*/              @!P2 BRA 0x100 ;                                  /* 0x0000000000b8a947 */
        /*0050*/               @P3 BRA 0x80 ;                                   /* 0x0000000000083947 */
        /*0060*/                   STL [R1+0x4], R9 ;                           /* 0x0000040901007387 */
        /*0070*/                   LDL.LU R9, [R1+0x4] ;                        /* 0x0000040001097983 */
        /*0080*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;   /* 0x01e00000081879f0 */
        /*0090*/                   LDL.64 R4, [R1+0x8] ;                        /* 0x0000080001047983 */
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;                      /* 0x0000000102027810 */
        /*00b0*/               @P1 BRA 0x30 ;                                   /* 0xfffffffc00dc1947 */
        /*00c0*/                   HGMMA.64x128x16.F32 R88, gdesc[UR8], R88 ;   /* 0x01e00000085879f0 */
        /*00d0*/                   STL.64 [R1+0x10], R6 ;                       /* 0x0000100601007387 */
        /*00e0*/               @P0 BRA 0x10 ;                                   /* 0xfffffffc00480947 */
        /*00f0*/                   EXIT ;                                       /* 0x000000000000794d */
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3] ;    /* 0x000000030000755a */
        /*0110*/              @!P2 BRA 0x100 ;                                  /* 0xfffffffc00f8a947 */
        /*0120*/                   BRA 0x50 ;                                   /* 0xfffffffc00c87947 */
        /*0130*/                   BRA 0x130;                                   /* 0xfffffffc00fc7947 */
"""


def addresses(instructions):
    return [i.address for i in instructions]


def test_instructions():
    code = sass.parse(LISTING)
    assert addresses(code) == list(range(0, 0x140, 0x10))
    assert sum(i.mma for i in code) == 3
    assert addresses(i for i in code if i.local) == [0x10, 0x60, 0x70, 0x90, 0xD0]
    assert [i.target for i in code if i.jumps] == [0x100, 0x80, 0x30, 0x10, None, 0x100, 0x50, 0x130]
    assert [i.address for i in code if not i.falls_through] == [0xF0, 0x120, 0x130]
    assert code[4] == sass.Instruction(0x40, "!P2", "BRA", "0x100")


def test_the_main_loop_is_the_innermost_with_products_and_knows_what_is_jumped_over():
    (loop,) = sass.main_loops(sass.parse(LISTING))
    assert addresses(loop.always) == [0x30, 0x40, 0x50, 0x80, 0x90, 0xA0, 0xB0]
    assert addresses(loop.sometimes) == [0x60, 0x70, 0x100, 0x110, 0x120]


def test_each_way_through_a_loop_with_a_product_of_its_own_counts():
    # Masked and unmasked tiles with separate products: neither is a border that is merely jumped over.
    code = sass.parse(
        LISTING.replace("IADD3 R2, R2, 0x1, RZ", "HGMMA.64x128x16 R24, gdesc[UR4]").replace("0x80 ;", "0x90 ;")
    )
    (loop,) = sass.main_loops(code)
    assert {0x60, 0x70, 0x80, 0x90} <= set(addresses(loop.always))


def test_a_loop_without_products_is_not_a_main_loop():
    assert sass.main_loops(sass.parse(LISTING.replace("HGMMA", "IMAD"))) == []
    assert sass.main_loops(()) == []


ROW = Row(
    "forward", "64/64", "bfloat16", "", "tile", 168, 1000, local=9, loop=1, border=2, loops=2, mma=48, serialised=False
)


def test_equal_and_better_rows_pass():
    assert not list(compile_hopper.differences([ROW], [ROW]))
    better = replace(ROW, registers=160, local=0, loop=0, border=0)
    assert not list(compile_hopper.differences([better], [ROW]))
    assert compile_hopper.improved([better], [ROW]) == [ROW.name] and compile_hopper.improved([ROW], [ROW]) == []


@pytest.mark.parametrize("count", compile_hopper.COUNTS)
def test_every_count_that_grows_is_said(count):
    worse = replace(ROW, **{count: getattr(ROW, count) + 1})
    (said,) = compile_hopper.differences([worse], [ROW])
    assert ROW.name in said and count in said


def test_other_configurations_than_the_tables_are_said():
    other = replace(ROW, special="softcap")
    assert sorted(compile_hopper.differences([other], [ROW])) == [
        "forward 64/64 bfloat16 softcap: not in the table",
        "forward 64/64 bfloat16: in the table, and not compiled any more",
    ]
    for changed in (replace(ROW, tile="another"), replace(ROW, mma=47), replace(ROW, loops=1)):
        assert len(list(compile_hopper.differences([changed], [ROW]))) == 1


def test_what_remains_has_to_be_explained_where_it_is():
    everywhere = tuple(Explanation("forward", "64/64", place, "why") for place in ("loop", "border", "outside"))
    assert not list(compile_hopper.unexplained([ROW], everywhere))
    for n, place in enumerate(("loop", "border", "outside")):
        (said,) = compile_hopper.unexplained([ROW], everywhere[:n] + everywhere[n + 1 :])
        assert f"({place})" in said
    of_another = replace(everywhere[0], special="softcap")
    assert len(list(compile_hopper.unexplained([ROW], (of_another, *everywhere[1:])))) == 1
    bad = replace(ROW, serialised=True, loops=0)
    assert len(list(compile_hopper.unexplained([bad], everywhere))) == 2


def test_the_committed_table_covers_what_ships_and_is_explained():
    _, rows = compile_hopper.read_table()
    assert [row.name for row in rows] == [shape.name for shape in compile_hopper.shapes()]
    assert not list(compile_hopper.unexplained(rows))


def test_no_main_loop_has_a_local_load_and_none_could_be_explained():
    _, rows = compile_hopper.read_table()
    assert not any(row.loop for row in rows)
    for row in rows:
        (said,) = compile_hopper.unexplained([replace(row, local=row.local + 1, loop=1)]) if row.mma else ("(loop)",)
        assert "(loop)" in said


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_hopper, "TABLE", tmp_path / "table.json")
    compile_hopper.write_table([ROW, replace(ROW, special="sinks")])
    version, rows = compile_hopper.read_table()
    assert version == compile_hopper.triton.__version__ and rows == [ROW, replace(ROW, special="sinks")]
