"""Compile the kernels for GPUs that need not be here, and print what came out, as JSON. A process of its own: in one where Triton
interprets, nothing is compiled.

    python tests/csrc_triton/compiled.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nullspace.csrc_triton import grouped, stage, syrk
from nullspace.csrc_triton.tiles import DOUBLE, HALF, HALF_DEFAULT, SINGLE, Tiling

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ALIGNED = {"g", "x", "out", "tiles", "rows", "listed", "offsets", "squares", "sums", "d", "stride", "out_stride"}


def compile_for(kernel: Any, capability: int, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if name in ALIGNED and not kind.startswith("tensordesc")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False, **options})


def facts(compiled: Any) -> dict[str, Any]:
    """Registers, shared memory, and what the innermost loop around the matrix instructions holds."""
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", dump)]
    products = [at for at, text in instructions if re.search(r"HGMMA|HMMA|DMMA|UTC\w*MMA", text)]
    loops = []
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= at:
            inside = [t for a, t in instructions if int(target[1], 16) <= a <= at]
            if any(int(target[1], 16) <= a <= at for a in products):
                loops.append(inside)
    loop = min(loops, key=len, default=[])
    return {
        "stack": int(re.search(r"STACK:(\d+)", dump)[1]),  # type: ignore[index]
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),  # type: ignore[index]
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "waits": re.findall(r"wgmma\.wait_group\S* *(\d+)", ptx),
        "mma": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+", ptx))),
        "adds": len(re.findall(r"\badd(?:\.rn)?\.f32\b", ptx)),
        "subtractions": len(re.findall(r"\bsub(?:\.rn)?\.f32\b", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "loop": {
            "products": sum(bool(re.search(r"HGMMA|HMMA|DMMA|UTC\w*MMA", t)) for t in loop),
            "float32 adds": sum("FADD" in t for t in loop),
            "waits": sum("DEPBAR" in t and "gsb0" in t for t in loop),
            "spills": sum(bool(re.search(r"\b(?:LDL|STL)\b", t)) for t in loop),
        },
    }


def syrk_for(dtype: torch.dtype, tiling: Tiling, capability: int, *, descriptor: bool) -> dict[str, Any]:
    kind = NAMES[dtype]
    x = f"tensordesc<{kind}[{tiling.block_k},{tiling.block}]>" if descriptor else f"*{kind}"
    signature = {"g": "*fp64", "x": x, "tiles": "*i64", "tokens": "i32", "d": "i32", "stride": "i64"}
    constants = {
        "BLOCK": tiling.block,
        "BLOCK_K": tiling.block_k,
        "WINDOW": tiling.window,
        "DESCRIPTOR": descriptor,
        "PRODUCTS": "tf32x3" if dtype == torch.float32 else "ieee",
        "UPCAST": False,
    }
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return {**facts(compile_for(syrk._syrk, capability, signature, constants, **options)), "entries": tiling.block**2}


def rows_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    signature = {"g": "*fp64", "x": f"*{NAMES[dtype]}", "tiles": "*i64", "tile_count": "i32", "rows": "*i64", "count": "*i64"}
    signature |= {"d": "i32", "stride": "i64"}
    constants = {"BLOCK": DOUBLE.block, "BLOCK_K": DOUBLE.block_k}
    options = {"num_warps": DOUBLE.warps, "num_stages": DOUBLE.stages, "enable_fp_fusion": True}
    return facts(compile_for(syrk._syrk_rows, capability, signature, constants, **options))


def grouped_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    signature = {"g": "*fp64", "x": f"*{NAMES[dtype]}", "tiles": "*i64", "tile_count": "i32", "listed": "*i64", "offsets": "*i64"}
    signature |= {"limit": "i32", "d": "i32", "stride": "i64", "group_stride": "i64"}
    constants = {"BLOCK": tiling.block, "BLOCK_K": tiling.block_k, "WINDOW": tiling.window, "GATHER": True, "UPCAST": False}
    constants["PRODUCTS"] = "tf32x3" if dtype == torch.float32 else "ieee"
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return {**facts(compile_for(grouped._syrk_grouped, capability, signature, constants, **options)), "entries": tiling.block**2}


def staging_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    kind = f"*{NAMES[dtype]}"
    signature = {"x": kind, "rows": "*i64", "out": kind, "squares": "*fp64", "sums": "*fp64", "count": "i32", "d": "i32"}
    signature |= {"stride": "i64", "out_stride": "i64"}
    return facts(
        compile_for(
            stage._stage,
            capability,
            signature,
            {"GATHER": True, "ROWS": stage.ROWS, "COLUMNS": stage.COLUMNS, "CHUNK": stage.CHUNK},
        )
    )


def representative(kernel: str, dtype: torch.dtype, capability: int, *, descriptor: bool = False) -> bool:
    """Whether no other compilation shows the same. float16 takes bfloat16's ways, and differs in the name of an instruction; 8.9
    shares 8.0's instructions, and has less shared memory, which only `_syrk` and its grouped form come near."""
    if dtype == torch.float16:
        return kernel == "syrk" and capability == 90 and descriptor
    if kernel == "stage":
        return dtype == torch.bfloat16 and capability != 89
    return capability != 89 or kernel in ("syrk", "grouped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 86, 89, 90, 100, 120])
    parser.add_argument("--representative", action="store_true", help="leave out what another compilation shows as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"triton": triton.__version__, "syrk": {}, "grouped": {}, "rows": {}, "stage": {}}
    kernels = {"grouped": grouped_for, "rows": rows_for, "stage": staging_for}
    for capability in arguments.capabilities:
        half = HALF.get(divmod(capability, 10), HALF_DEFAULT)  # type: ignore[arg-type]
        for dtype, tiling in ((torch.bfloat16, half), (torch.float16, half), (torch.float32, SINGLE)):
            name = f"{NAMES[dtype]} sm_{capability}"
            for descriptor in {False, tiling.descriptor}:
                if not arguments.representative or representative("syrk", dtype, capability, descriptor=descriptor):
                    way = "descriptor" if descriptor else "pointer"
                    result["syrk"][f"{name} {way}"] = syrk_for(dtype, tiling, capability, descriptor=descriptor)
            for kernel, compiled in kernels.items():
                if not arguments.representative or representative(kernel, dtype, capability):
                    result[kernel][name] = compiled(dtype, tiling, capability)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
