"""Reading machine code: does it store the tiles' shapes before it loads them?"""

from __future__ import annotations

from tools.checks.amx_build import tiles_are_stored

LOAD = "  ldtilecfg 0xc0(%rsp)"
ZEROED = "  vmovdqa64 %zmm0,0xc0(%rsp)\n  movb   $0x1,0xc0(%rsp)"
CASES = {
    f"{ZEROED}\n{LOAD}": False,
    f"{ZEROED}\n  mov    %rdx,0xf0(%rsp)\n  vmovdqa %xmm0,0xd0(%rsp)\n{LOAD}": True,
    f"{ZEROED}\n  mov    %rdx,0x100(%rsp)\n{LOAD}": False,  # beyond the 64 bytes
    f"{ZEROED}\n  mov    %rdx,0xd0(%rbp)\n{LOAD}": False,  # another place
    f"{LOAD}\n  mov    %rdx,0xf0(%rsp)": False,  # too late
    "  ret": None,
}


def test_tiles_are_stored() -> None:
    """Only a store into the columns and rows, before the load, counts."""
    for code, stored in CASES.items():
        assert tiles_are_stored(code) is stored, code
