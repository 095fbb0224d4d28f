"""Triton's interpreter, in less than half of its time: for rehearsals and tests on a CPU.

What it computes stays as it is. Left out is what it does in vain:

- At each call of a device function it puts its own functions into `triton.language`, where the
  launch of the kernel has put them already.
- For every tensor it makes a new table of NumPy's types.
- For every sum and product of integers it computes whether they overflow, and asserts that they do
  not: but only when debugging.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any


def hasten() -> None:
    """Leave it out in this process, if its Triton interprets."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang = _once(interpreter._patch_lang, interpreter._LangPatchScope, tl)
    interpreter._get_np_dtype = _known(interpreter._get_np_dtype, tl)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once(patch: Callable[[Any], Any], scope: type, tl: Any) -> Callable[[Any], Any]:
    """`patch` unless the launch that runs has patched the same modules."""
    patched: set[int] = set()  # ids of modules
    of_function: dict[Any, set[int]] = {}

    def patch_lang(fn: Any) -> Any:
        if fn not in of_function:
            seen = {id(each) for each in fn.__globals__.values()}
            of_function[fn] = seen & {id(tl), id(tl.core)}
        wanted = of_function[fn]
        if wanted and wanted <= patched:
            return scope()
        made = patch(fn)
        patched.update(wanted)
        restore = made.restore

        def end() -> None:
            patched.clear()
            restore()

        made.restore = end
        return made

    return patch_lang


def _known(np_dtype: Callable[[Any], Any], tl: Any) -> Callable[[Any], Any]:
    """`np_dtype` by the name of a scalar type."""
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if isinstance(dtype, tl.pointer_type):
            return np_dtype(dtype)
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    return get_np_dtype
