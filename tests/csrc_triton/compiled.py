"""Compile the kernels for GPUs that need not be here, and print what came out, as JSON. A process of its own: in one where Triton
interprets, nothing is compiled. Every compilation is a process again: compilers that cannot do something abort.

    python tests/csrc_triton/compiled.py
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nullspace.csrc_triton import grouped, selected, stage, syrk
from nullspace.csrc_triton.tiles import DOUBLE, HALF, HALF_DEFAULT, SINGLE, Tiling

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ALIGNED = {"g", "x", "out", "tiles", "rows", "listed", "offsets", "squares", "sums", "d", "stride", "out_stride"}


def compile_for(kernel: Any, capability: int, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    names = kernel.arg_names
    source_class = ASTSource
    if hasattr(kernel, "is_gluon") and kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source_class
    source = source_class(
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


MATRIX_INSTRUCTION = r"HGMMA|HMMA|DMMA|UTC\w*MMA"


def facts(compiled: Any) -> dict[str, Any]:
    """Registers, shared memory, and what the innermost loops around the matrix instructions hold."""
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    loops = innermost_loops(dump)
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
        "loop": loops[0],
        "loops": loops,
    }


def innermost_loops(dump: str) -> list[dict[str, Any]]:
    """What each loop holds that contains matrix instructions and no other such loop, the shortest one first; [{}] without any."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", dump)]
    products = [at for at, text in instructions if re.search(MATRIX_INSTRUCTION, text)]
    shortest: dict[tuple[int, ...], tuple[int, int]] = {}  # by the matrix instructions inside: a loop may have several jumps back
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        inside = tuple(a for a in products if target and int(target[1], 16) <= a <= at)
        if inside and (inside not in shortest or at - int(target[1], 16) < shortest[inside][1] - shortest[inside][0]):  # type: ignore[index]
            shortest[inside] = (int(target[1], 16), at)  # type: ignore[index]
    inner = [span for key, span in shortest.items() if not any(set(other) < set(key) for other in shortest)]
    loops = [[text for at, text in instructions if start <= at <= end] for start, end in inner]
    return [described(loop) for loop in sorted(loops, key=len)] or [{}]


def described(loop: list[str]) -> dict[str, Any]:
    barriers = [text for text in loop if re.search(r"\bBAR\.", text)]
    # A barrier of a part of a program names the number of its threads.
    parts = [text for text in barriers if re.search(r"0x[0-9a-f]+, *0x80\b|, *0x40\b|, *0x20\b", text)]
    return {
        "instructions": len(loop),
        "products": sum(bool(re.search(MATRIX_INSTRUCTION, text)) for text in loop),
        "float32 adds": sum("FADD" in text for text in loop),
        "waits": sum("DEPBAR" in text and "gsb0" in text for text in loop),
        "spills": sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for text in loop),
        "barriers": len(barriers) - len(parts),
        "barriers of a warpgroup": len(parts),
        "freed behind a barrier": freed_behind_a_barrier(loop),
    }


def freed_behind_a_barrier(loop: list[str]) -> bool:
    """Whether a barrier stands between the last wait for products and the arrival that lets another warp overwrite operands."""
    kinds = [
        "wait" if "DEPBAR" in text and "gsb0" in text else "barrier" if re.search(r"\bBAR\.", text) else "arrival"
        for text in loop
        if ("DEPBAR" in text and "gsb0" in text) or re.search(r"\bBAR\.|SYNCS\.ARRIVE", text)
    ]
    return "barrier" in kinds[kinds.index("wait") : kinds.index("arrival")] if {"wait", "arrival"} <= set(kinds) else False


def syrk_for(dtype: torch.dtype, tiling: Tiling, capability: int, *, descriptor: bool) -> dict[str, Any]:
    kind = NAMES[dtype]
    x = f"tensordesc<{kind}[{tiling.block_k},{tiling.block}]>" if descriptor else f"*{kind}"
    signature = {"g": "*fp64", "x": x, "tiles": "*i64", "tokens": "i32", "share": "i32", "d": "i32", "stride": "i64"}
    signature["part_stride"] = "i64"
    constants = {
        "BLOCK": tiling.block,
        "BLOCK_K": tiling.block_k,
        "WINDOW": tiling.window,
        "VARIANT": tiling.variant,
        "DESCRIPTOR": descriptor,
        "PRODUCTS": "tf32x3" if dtype == torch.float32 else "ieee",
        "INTERPRETED": False,
    }
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return {**facts(compile_for(syrk._syrk, capability, signature, constants, **options)), "entries": tiling.block**2}


def gluon_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    from triton.experimental.gluon import language as gl

    from nullspace.csrc_triton import hopper

    half, whole = hopper.layouts(tiling.block_k, dtype)
    kind = NAMES[dtype]
    signature = {"g": "*fp64", "xa": f"tensordesc<{kind}[{tiling.block_k},64],{half!r}>"}
    signature |= {"xb": f"tensordesc<{kind}[{tiling.block_k},128],{whole!r}>", "tiles": "*i64", "tokens": "i32", "share": "i32"}
    signature |= {"d": "i32", "part_stride": "i64"}
    variant = tiling.variant.removeprefix("gluon-")
    constants = {
        "DTYPE": gl.bfloat16 if dtype == torch.bfloat16 else gl.float16,
        "BLOCK_K": tiling.block_k,
        "STAGES": tiling.stages,
    }
    constants |= {"VARIANT": variant, "REGISTERS": hopper.REGISTERS[variant]}
    # Of an accumulator of 64 rows, 128 threads have what 256 have of one of 128.
    return {
        **facts(compile_for(hopper._syrk_gluon, capability, signature, constants, num_warps=4)),
        "entries": tiling.block**2 // 2,
    }


def rows_for(dtype: torch.dtype, tiling: Tiling, capability: int, *, matrix: bool | None = None) -> dict[str, Any]:
    signature = {"g": "*fp64", "x": f"*{NAMES[dtype]}", "tiles": "*i64", "tile_count": "i32", "rows": "*i64", "count": "*i64"}
    signature |= {"d": "i32", "stride": "i64"}
    return facts(compile_for(selected._syrk_rows, capability, signature, float64_constants(capability, matrix), **FLOAT64_OPTIONS))


def grouped_rows_for(dtype: torch.dtype, tiling: Tiling, capability: int, *, matrix: bool | None = None) -> dict[str, Any]:
    signature = {"g": "*fp64", "x": f"*{NAMES[dtype]}", "tiles": "*i64", "tile_count": "i32", "rows": "*i64", "offsets": "*i64"}
    signature |= {"limit": "i32", "programs": "i32", "d": "i32", "stride": "i64", "group_stride": "i64"}
    constants = float64_constants(capability, matrix)
    return facts(compile_for(grouped._syrk_rows_grouped, capability, signature, constants, **FLOAT64_OPTIONS))


FLOAT64_OPTIONS = {"num_warps": DOUBLE.warps, "num_stages": DOUBLE.stages, "enable_fp_fusion": True}


def float64_constants(capability: int, matrix: bool | None) -> dict[str, Any]:
    chosen = selected.multiplies_float64(divmod(capability, 10), syrk.triton_version())
    return {"BLOCK": DOUBLE.block, "BLOCK_K": DOUBLE.block_k, "MATRIX": chosen if matrix is None else matrix}


def sum_rows_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    signature = {"total": "*fp64", "x": f"*{NAMES[dtype]}", "rows": "*i64", "offsets": "*i64", "limit": "i32", "d": "i32"}
    signature["stride"] = "i64"
    return facts(compile_for(grouped._sum_rows, capability, signature, {"BLOCK_K": 32, "COLUMNS": grouped.COLUMNS}))


def zero_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    signature = {"x": f"*{NAMES[dtype]}", "rows": "*i64", "count": "*i64", "d": "i32", "stride": "i64"}
    return facts(compile_for(stage._zero, capability, signature, {"COLUMNS": 1024}))


def grouped_for(dtype: torch.dtype, tiling: Tiling, capability: int) -> dict[str, Any]:
    signature = {"g": "*fp64", "x": f"*{NAMES[dtype]}", "tiles": "*i64", "tile_count": "i32", "listed": "*i64", "offsets": "*i64"}
    signature |= {"limit": "i32", "d": "i32", "stride": "i64", "group_stride": "i64"}
    constants = {"BLOCK": tiling.block, "BLOCK_K": tiling.block_k, "WINDOW": tiling.window, "VARIANT": tiling.variant}
    constants |= {"GATHER": True, "PRODUCTS": "tf32x3" if dtype == torch.float32 else "ieee", "INTERPRETED": False}
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


PLAIN_KERNELS = {
    "rows": rows_for,
    "grouped rows": grouped_rows_for,
    "stage": staging_for,
    "zero": zero_for,
    "sum rows": sum_rows_for,
}


def cells(capability: int) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """Compilations for a device, by kernel and name. Left out is what another one shows: float16 takes bfloat16's ways, and differs
    in the name of an instruction; 8.6 and 8.9 share 8.0's instructions, and have less shared memory, which only `_syrk` and its
    grouped form come near; copies and sums of float32 numbers are compiled as those of 16 bits."""
    table = HALF.get(divmod(capability, 10), HALF_DEFAULT)  # type: ignore[arg-type]
    half = table[max(table)]
    result: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}
    for dtype, base in ((torch.bfloat16, half), (torch.float16, half), (torch.float32, SINGLE)):
        name = f"{NAMES[dtype]} sm_{capability}"
        for variant in ("kahan", "plain") if dtype != torch.float16 else ("kahan",):
            tiling, suffix = base._replace(variant=variant), "" if variant == "kahan" else f" {variant}"
            for descriptor in {False, tiling.descriptor} if dtype != torch.float16 else {tiling.descriptor}:
                way = "descriptor" if descriptor else "pointer"
                result["syrk", f"{name} {way}{suffix}"] = partial(syrk_for, dtype, tiling, capability, descriptor=descriptor)
            if dtype != torch.float16:
                result["grouped", f"{name}{suffix}"] = partial(grouped_for, dtype, tiling, capability)
            if capability == 90 and dtype != torch.float32:
                gluon = base._replace(variant=f"gluon-{variant}")
                result["gluon", f"{name} {variant}"] = partial(gluon_for, dtype, gluon, capability)
        if capability in (86, 89) or dtype == torch.float16:
            continue
        for kernel, compile_one in PLAIN_KERNELS.items():
            if dtype == torch.bfloat16 or kernel == "rows":
                result[kernel, name] = partial(compile_one, dtype, base, capability)
        if dtype == torch.bfloat16:
            for way, matrix in (("matrix", True), ("outer", False)):
                result["float64", f"{name} {way}"] = partial(rows_for, dtype, base, capability, matrix=matrix)
    return result


def representative(kernel: str, name: str, capability: int) -> bool:
    """Whether the suite compiles it each time: with the Triton that is installed, and where devices differ."""
    dtype, *_, way = name.split()
    if kernel in ("grouped rows", "sum rows", "zero") or (dtype == "fp32" and kernel == "rows"):
        return False
    if kernel == "float64":
        return capability == 80 and way == "outer"
    if dtype == "fp16":
        return kernel == "syrk" and capability == 90
    if kernel in ("syrk", "grouped") and way == "plain":
        return kernel == "syrk" and dtype == "bf16" and (capability == 80 or "descriptor" in name)
    if capability == 90:  # one grouped form, and descriptors
        return name not in ("bf16 sm_90 pointer", "fp32 sm_90")
    return True


def in_a_process(compile_one: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a compilation comes to, or `{"error": its last words}`."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(compile_one).result()
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 86, 89, 90, 100, 120])
    parser.add_argument("--representative", action="store_true", help="leave out what another compilation shows as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"triton": triton.__version__}
    for capability in arguments.capabilities:
        for (kernel, name), compile_one in cells(capability).items():
            if not arguments.representative or representative(kernel, name, capability):
                result.setdefault(kernel, {})[name] = in_a_process(compile_one)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
